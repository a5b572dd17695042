"""COCO box metrics for every dataset whose records or json are COCO-like.

Computed by faster-coco-eval where it is installed, else by pycocotools, with the same results.
"""

import contextlib
import io
import itertools
import json
import logging
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import BoxMode
from detectron2.utils import comm

from ..data.datasets.coco import read_coco_json
from ..data.datasets.validate import box_fault

_LOGGER = logging.getLogger(__name__)
_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_IOU_90 = 8  # index of 0.9 in the IoU thresholds 0.5, 0.55, ..., 0.95


def coco_ground_truth(name: str) -> dict[str, list]:
    """Return the ground truth of a registered dataset as a COCO dictionary.

    Read from the dataset's json where there is one, so that areas and ids are the official ones,
    else converted from its records. Boxes that training ignores are ignored here too.

    Raises:
        DataError: if the json is missing or broken.
    """
    json_file = MetadataCatalog.get(name).get("json_file")
    if not json_file:
        return _from_records(DatasetCatalog.get(name), MetadataCatalog.get(name).thing_classes)
    content = read_coco_json(json_file)
    sizes = {i["id"]: (i["height"], i["width"]) for i in content["images"]}
    annotations = [
        {"iscrowd": 0, "area": float(a["bbox"][2]) * float(a["bbox"][3]), **a}
        for a in content["annotations"]
        if not box_fault({**a, "bbox_mode": BoxMode.XYWH_ABS}, *sizes.get(a["image_id"], ()))
    ]
    return {**content, "annotations": annotations}


def _from_records(records: list[dict], classes: list[str]) -> dict[str, list]:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for record in records:
        height, width, image_id = record["height"], record["width"], record["image_id"]
        image = {"id": image_id, "file_name": record["file_name"]}
        images.append({**image, "height": height, "width": width})
        for a in record["annotations"]:
            if not box_fault(a, height, width):
                box = BoxMode.convert(list(a["bbox"]), a["bbox_mode"], BoxMode.XYWH_ABS)
                entry = {"id": len(annotations) + 1, "image_id": image_id}
                entry |= {"category_id": a["category_id"], "iscrowd": a.get("iscrowd", 0)}
                annotations.append({**entry, "bbox": box, "area": box[2] * box[3]})
    categories = [{"id": i, "name": name} for i, name in enumerate(classes)]
    return {"images": images, "annotations": annotations, "categories": categories}


class CocoEvaluator(DatasetEvaluator):
    """Average precision as COCO defines it, in total, by object size and by class.

    The detections go to ``coco_instances_results.json`` in `output_folder`, if there is one.
    """

    def __init__(self, name: str, output_folder: str | Path | None = None) -> None:
        self.name = name
        self.output_folder = Path(output_folder) if output_folder else None
        self._ground_truth = coco_ground_truth(name)
        categories = sorted(self._ground_truth["categories"], key=lambda c: c["id"])
        self._category_ids = [c["id"] for c in categories]
        self._classes = [c["name"] for c in categories]
        self._detections: list[dict] = []

    def reset(self) -> None:
        """Clear the detections."""
        self._detections = []

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Collect the ``instances`` of a batch."""
        for record, output in zip(inputs, outputs, strict=True):
            instances = output["instances"].to("cpu")
            boxes = instances.pred_boxes.tensor.numpy().astype(np.float64)
            boxes[:, 2:] -= boxes[:, :2]
            scores, labels = instances.scores.tolist(), instances.pred_classes.tolist()
            for box, score, label in zip(boxes.tolist(), scores, labels, strict=True):
                entry = {"image_id": record["image_id"], "category_id": self._category_ids[label]}
                self._detections.append({**entry, "bbox": box, "score": score})

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Gather the detections of all processes and compute the metrics on the main process.

        Returns:
            ``{"bbox": {"AP": ..., ..., "AP90": ..., "AP-<class>": ...}}`` in percent, NaN where
            there is nothing to measure; empty on other processes.
        """
        detections = list(itertools.chain(*comm.gather(self._detections)))
        if not comm.is_main_process():
            return {}
        if self.output_folder:
            self.output_folder.mkdir(parents=True, exist_ok=True)
            path = self.output_folder / "coco_instances_results.json"
            path.write_text(json.dumps(detections))
        if not detections:
            _LOGGER.warning("%s: the model made no detections.", self.name)
            names = [*_METRICS, "AP90", *(f"AP-{c}" for c in self._classes)]
            return OrderedDict(bbox=dict.fromkeys(names, float("nan")))
        return OrderedDict(bbox=self._measure(detections))

    def _measure(self, detections: list[dict]) -> dict[str, float]:
        coco_class, evaluation_class = _backend()
        with contextlib.redirect_stdout(io.StringIO()):  # both libraries report by printing
            ground_truth = coco_class()
            ground_truth.dataset = self._ground_truth
            ground_truth.createIndex()
            results = ground_truth.loadRes(detections)
            evaluation = evaluation_class(ground_truth, results, iouType="bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        result = {m: _percent(v) for m, v in zip(_METRICS, evaluation.stats[:6], strict=True)}
        # (IoU thresholds, recalls, classes, areas, detection limits); -1 where there is no object
        precision = evaluation.eval["precision"][:, :, :, 0, -1]
        result["AP90"] = _mean_precision(precision[_IOU_90])
        for index, name in enumerate(self._classes):
            result[f"AP-{name}"] = _mean_precision(precision[:, :, index])
        return result


def _percent(value: float) -> float:
    return float(value) * 100 if value >= 0 else float("nan")


def _mean_precision(precision: np.ndarray) -> float:
    """Mean in percent of the entries that are not -1; NaN without any."""
    measured = precision[precision > -1]
    return _percent(measured.mean()) if measured.size else float("nan")


def _backend() -> tuple[Any, Any]:
    """COCO and COCOeval classes of the fastest library that is installed."""
    try:
        from faster_coco_eval import COCO, COCOeval_faster

        return COCO, COCOeval_faster
    except ImportError:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        return COCO, COCOeval
