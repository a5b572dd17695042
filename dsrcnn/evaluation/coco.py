"""COCO box metrics for every dataset whose records or json are COCO-like.

Computed by faster-coco-eval where it is installed, else by pycocotools, with the same results.
"""

import contextlib
import io
import itertools
import logging
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import BoxMode
from detectron2.utils import comm

from ..data.build import load_records
from ..data.datasets.coco import CocoContent, is_checked, is_plain_coco, read_coco_json
from ..data.datasets.custom import require_class_names
from ..data.datasets.fields import show
from ..data.datasets.validate import box_fault, is_learnable, to_xyxy
from ..errors import DataError
from .files import write_detections

_LOGGER = logging.getLogger(__name__)
_AREAS = {"AP": 0, "APs": 1, "APm": 2, "APl": 3}
_IOU_50, _IOU_75, _IOU_90 = 0, 5, 8  # indices in the IoU thresholds 0.5, 0.55, ..., 0.95
_RECALLS = (1, 10, 100)  # detections per image of average recall


def coco_ground_truth(name: str) -> dict[str, list]:
    """Return the ground truth of a registered dataset as a COCO dictionary.

    Read from the dataset's json where there is one, so that areas and ids are the official ones,
    else converted from its records. Boxes that training ignores are ignored here too. Categories
    are in the order of labels. Images and classes of the json that are none of the dataset's are
    left out.

    Raises:
        DataError: if the json is missing or broken, the records or class names are, or the metadata
            name other classes than the json.
    """
    json_file = MetadataCatalog.get(name).get("json_file")
    if not json_file:
        records = load_records(name, for_training=False, find_images=False)
        return _from_records(records, require_class_names(name))
    content = read_coco_json(json_file)
    images = {image["id"]: image for image in content.images}
    if not (is_checked(name) or is_plain_coco(name)):  # what a user's function does is unknown
        records = load_records(name, for_training=False, find_images=False)
        ids = {plain_id(record["image_id"]) for record in records}
        images = {number: image for number, image in images.items() if number in ids}
    classes = _classes_by_label(name, content)
    annotations = []
    for a in content.annotations:
        a.pop("segmentation", None)
        image = images.get(a["image_id"])
        if image and a["category_id"] in classes and not _fault(a, image):
            annotations.append(a)
    categories = [{"id": number, "name": name} for number, name in classes.items()]
    return {"images": [*images.values()], "annotations": annotations, "categories": categories}


def _fault(annotation: dict[str, Any], image: dict[str, Any]) -> str | None:
    box = {"bbox": annotation["bbox"], "bbox_mode": BoxMode.XYWH_ABS}
    return box_fault(box, image["height"], image["width"])


def plain_id(number: Any) -> int | str:
    """Convert the ``image_id`` of a record, which may be of numpy, to Python's."""
    return number.item() if hasattr(number, "item") else number


def _classes_by_label(name: str, content: CocoContent) -> dict[int | str, str]:
    """Return class names by category id, in the order of the labels of dataset `name`.

    As in Detectron2 its ``thing_dataset_id_to_contiguous_id`` decides; without one the names in
    ``thing_classes`` do.
    """
    known = dict(content.categories)
    if content.parent is not None:
        known[0] = content.parent
    names = require_class_names(name)  # may load the dataset, which sets the other
    metadata = MetadataCatalog.get(name)
    labels = metadata.get("thing_dataset_id_to_contiguous_id")
    where = f"The metadata of dataset {name!r}"
    if labels is None:
        numbers = {text: number for number, text in reversed(known.items())}
        for text in names:
            if text not in numbers:
                raise DataError(
                    f"{where} names the class {text!r}, but {metadata.json_file} has "
                    f"{', '.join(known.values())}. Correct thing_classes, or set "
                    "thing_dataset_id_to_contiguous_id, the label of each category id."
                )
        return {numbers[text]: text for text in names}
    advice = "Correct thing_dataset_id_to_contiguous_id."
    ordered = sorted(labels, key=labels.__getitem__)
    if [labels[number] for number in ordered] != list(range(len(names))):
        raise DataError(
            f"{where} maps categories to the labels {', '.join(map(str, labels.values()))}, "
            f"expected 0 to {len(names) - 1}, each once, for {len(names)} classes. {advice}"
        )
    for number in ordered:
        if number not in known:
            raise DataError(
                f"{where} maps the category {show(number)}, but {metadata.json_file} has "
                f"{', '.join(map(str, known))}. {advice}"
            )
    return dict(zip(ordered, names, strict=True))


def _from_records(records: list[dict], classes: list[str]) -> dict[str, list]:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for record in records:
        height, width, image_id = record.get("height"), record.get("width"), record["image_id"]
        image = {"id": image_id, "file_name": str(record["file_name"])}
        images.append({**image, "height": height, "width": width})
        for a in record["annotations"]:
            if not box_fault(a, height, width):
                x1, y1, x2, y2 = to_xyxy(a)
                entry = {"id": len(annotations) + 1, "image_id": image_id}
                entry |= {"category_id": int(a["category_id"]), "iscrowd": int(not is_learnable(a))}
                box = [x1, y1, x2 - x1, y2 - y1]
                annotations.append({**entry, "bbox": box, "area": box[2] * box[3]})
    categories = [{"id": i, "name": name} for i, name in enumerate(classes)]
    return {"images": images, "annotations": annotations, "categories": categories}


class CocoEvaluator(DatasetEvaluator):
    """Average precision and recall as COCO defines them, in total, by object size and by class.

    The detections go to ``coco_instances_results.json`` in `output_folder`, if there is one.
    """

    def __init__(
        self, name: str, output_folder: str | Path | None = None, *, max_detections: int = 100
    ) -> None:
        """Read the ground truth of a dataset; the best `max_detections` of an image count."""
        self.name = name
        self.max_detections = max_detections
        self.output_folder = Path(output_folder) if output_folder else None
        content = coco_ground_truth(name)
        self._category_ids = [c["id"] for c in content["categories"]]
        self._classes = [c["name"] for c in content["categories"]]
        self._image_numbers = {image["id"]: n for n, image in enumerate(content["images"], start=1)}
        self._labels = {number: label for label, number in enumerate(self._category_ids, start=1)}
        self._ground_truth = self._renumber(content)
        self._detections: list[dict] = []

    def _renumber(self, content: dict[str, list]) -> dict[str, list]:
        """Number all from 1 in place; the libraries skip objects of id 0 and refuse text."""
        for entries in content.values():
            for number, entry in enumerate(entries, start=1):
                entry["id"] = number
        for annotation in content["annotations"]:
            annotation.update(self._numbers(annotation))
        return content

    def _numbers(self, entry: dict[str, Any]) -> dict[str, int]:
        """Return the new numbers of image and class of an object or a detection."""
        image, label = self._image_numbers[entry["image_id"]], self._labels[entry["category_id"]]
        return {"image_id": image, "category_id": label}

    @property
    def detections(self) -> list[dict]:
        """COCO results that this process has collected, with the ids of the annotations."""
        return self._detections

    def reset(self) -> None:
        """Clear the detections."""
        self._detections = []

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Collect the ``instances`` of a batch."""
        for record, output in zip(inputs, outputs, strict=True):
            image_id = plain_id(record["image_id"])
            if image_id not in self._image_numbers:
                raise DataError(
                    f"Dataset {self.name!r} has an image with image_id {image_id!r}, which its "
                    "json_file lacks; correct its function or its metadata."
                )
            instances = output["instances"].to("cpu")
            boxes = instances.pred_boxes.tensor.numpy().astype(np.float64)
            boxes[:, 2:] -= boxes[:, :2]
            scores, labels = instances.scores.tolist(), instances.pred_classes.tolist()
            for box, score, label in zip(boxes.tolist(), scores, labels, strict=True):
                entry = {"image_id": image_id, "category_id": self._category_ids[label]}
                self._detections.append({**entry, "bbox": box, "score": score})

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Gather the detections of all processes and compute the metrics on the main process.

        Returns:
            ``{"bbox": {"AP": ..., ..., "AR100": ..., "AP-<class>": ...}}`` in percent, NaN where
            there is nothing to measure; empty without labels and on other processes.
        """
        detections = list(itertools.chain(*comm.gather(self._detections)))
        if not comm.is_main_process():
            return {}
        if self.output_folder:
            path = self.output_folder / "coco_instances_results.json"
            write_detections(path, detections)
        if all(a["iscrowd"] for a in self._ground_truth["annotations"]):
            place = f"; the predictions are in {path}" if self.output_folder else ""
            _LOGGER.warning("%s has no labels: metrics are left out%s.", self.name, place)
            return OrderedDict()
        if not detections:
            _LOGGER.warning("%s: the model made no detections.", self.name)
            names = [*self.metrics, *(f"AP-{c}" for c in self._classes)]
            return OrderedDict(bbox=dict.fromkeys(names, float("nan")))
        return OrderedDict(bbox=self._measure(detections))

    def _measure(self, detections: list[dict]) -> dict[str, float]:
        coco_class, evaluation_class = _backend()
        with contextlib.redirect_stdout(io.StringIO()):  # both libraries report by printing
            ground_truth = coco_class()
            ground_truth.dataset = self._ground_truth
            ground_truth.createIndex()
            results = ground_truth.loadRes([{**d, **self._numbers(d)} for d in detections])
            evaluation = evaluation_class(ground_truth, results, iouType="bbox")
            evaluation.params.maxDets = self._limits
            evaluation.evaluate()
            evaluation.accumulate()
        # (IoU thresholds, recalls, classes, areas, limits), and without recalls; -1 where there is
        # no object. `summarize` of the libraries knows a limit of 100 only.
        precision = evaluation.eval["precision"][..., -1]
        recall = evaluation.eval["recall"][:, :, 0]
        whole = precision[..., 0]
        parts = {
            "AP": whole,
            "AP50": whole[_IOU_50],
            "AP75": whole[_IOU_75],
            **{name: precision[..., area] for name, area in _AREAS.items() if area},
            "AP90": whole[_IOU_90],
            **{f"AR{limit}": recall[..., i] for i, limit in enumerate(self._limits)},
            **{f"AP-{name}": whole[:, :, i] for i, name in enumerate(self._classes)},
        }
        return {name: _mean_in_percent(values) for name, values in parts.items()}

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics, without those of classes."""
        average_precisions = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AP90"]
        return [*average_precisions, *(f"AR{limit}" for limit in self._limits)]

    @property
    def _limits(self) -> list[int]:
        """Detections per image that are counted, ascending; precision uses the last."""
        most = self.max_detections
        return [*(limit for limit in _RECALLS if limit < most), most]


def _mean_in_percent(values: np.ndarray) -> float:
    """Mean in percent of the entries that are not -1; NaN without any."""
    measured = values[values > -1]
    return float(measured.mean()) * 100 if measured.size else float("nan")


def _backend() -> tuple[Any, Any]:
    """COCO and COCOeval classes of the fastest library that is installed."""
    try:
        from faster_coco_eval import COCO, COCOeval_faster

        return COCO, COCOeval_faster
    except ImportError:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        return COCO, COCOeval
