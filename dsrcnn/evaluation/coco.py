"""COCO box metrics for every data set whose records or json are COCO-like.

Counted by faster-coco-eval where it is installed, else by pycocotools; both give the same numbers.
"""

import contextlib
import copy
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
from tabulate import tabulate

from ..data.datasets.coco import read_coco_json
from ..data.datasets.validate import box_fault

__all__ = ["CocoEvaluator", "ground_truth_of"]

_LOGGER = logging.getLogger(__name__)
_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_STRICT = 8  # place of 0.9 among the IoU thresholds 0.5, 0.55, ..., 0.95


def ground_truth_of(name: str) -> dict[str, list]:
    """Ground truth of a registered data set as a COCO dictionary.

    It is the data set's json where there is one, so that areas and ids are the official ones, else
    it is made from the records. Boxes that training leaves out are left out here too.
    """
    json_file = MetadataCatalog.get(name).get("json_file")
    if not json_file:
        return _from_records(DatasetCatalog.get(name), MetadataCatalog.get(name).thing_classes)
    content = copy.copy(read_coco_json(json_file))
    sizes = {i["id"]: (i["height"], i["width"]) for i in content["images"]}
    content["annotations"] = [
        {"iscrowd": 0, "area": float(a["bbox"][2]) * float(a["bbox"][3]), **a}
        for a in content["annotations"]
        if not box_fault({**a, "bbox_mode": BoxMode.XYWH_ABS}, *sizes.get(a["image_id"], ()))
    ]
    return content


def _from_records(records: list[dict], classes: list[str]) -> dict[str, list]:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for record in records:
        images.append({k: record[k] for k in ("file_name", "height", "width")})
        images[-1]["id"] = record["image_id"]
        for annotation in record["annotations"]:
            if box_fault(annotation, record["height"], record["width"]):
                continue
            x, y, w, h = BoxMode.convert(
                list(annotation["bbox"]), annotation["bbox_mode"], BoxMode.XYWH_ABS
            )
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": record["image_id"],
                    "category_id": annotation["category_id"],
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": annotation.get("iscrowd", 0),
                }
            )
    categories = [{"id": i, "name": name} for i, name in enumerate(classes)]
    return {"images": images, "annotations": annotations, "categories": categories}


class CocoEvaluator(DatasetEvaluator):
    """Average precision as COCO defines it, in total, by object size and by class."""

    def __init__(
        self, name: str, *, output_folder: str | Path | None = None, backend: str | None = None
    ) -> None:
        """Prepare for one data set.

        Args:
            name: registered data set.
            output_folder: where ``coco_instances_results.json`` goes; None writes nothing.
            backend: "faster-coco-eval" or "pycocotools"; None takes the first that is installed.
        """
        self.name = name
        self.output_folder = Path(output_folder) if output_folder else None
        self.backend = backend
        self._ground_truth = ground_truth_of(name)
        self._category_ids = sorted(c["id"] for c in self._ground_truth["categories"])
        self._detections: list[dict] = []

    def reset(self) -> None:
        """Forget all detections."""
        self._detections = []

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Collect the ``instances`` of a batch."""
        for record, output in zip(inputs, outputs, strict=True):
            instances = output["instances"].to("cpu")
            corners = instances.pred_boxes.tensor.numpy().astype(np.float64)
            boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
            rows = zip(
                boxes.tolist(),
                instances.scores.tolist(),
                instances.pred_classes.tolist(),
                strict=True,
            )
            self._detections += [
                {
                    "image_id": record["image_id"],
                    "category_id": self._category_ids[label],
                    "bbox": box,
                    "score": score,
                }
                for box, score, label in rows
            ]

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Gather from all processes and compute the metrics on the main one.

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
        classes = [
            c["name"] for c in sorted(self._ground_truth["categories"], key=lambda c: c["id"])
        ]
        if not detections:
            _LOGGER.warning("%s: the model made no detections.", self.name)
            names = [*_METRICS, "AP90", *(f"AP-{c}" for c in classes)]
            return OrderedDict(bbox=dict.fromkeys(names, float("nan")))
        result = self._measure(detections, classes)
        _LOGGER.info("%s:\n%s", self.name, _tables(result, classes))
        return OrderedDict(bbox=result)

    def _measure(self, detections: list[dict], classes: list[str]) -> dict[str, float]:
        coco_class, evaluation_class = _backend(self.backend)
        with contextlib.redirect_stdout(io.StringIO()):  # both libraries report by printing
            ground_truth = coco_class()
            ground_truth.dataset = self._ground_truth
            ground_truth.createIndex()
            found = ground_truth.loadRes(detections)
            evaluation = evaluation_class(ground_truth, found, iouType="bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        result = {m: _percent(v) for m, v in zip(_METRICS, evaluation.stats[:6], strict=True)}
        # (IoU thresholds, recalls, classes, areas, detection limits); -1 where there is no object
        precision = evaluation.eval["precision"][:, :, :, 0, -1]
        strict = precision[_STRICT]
        strict = strict[strict > -1]
        result["AP90"] = _percent(strict.mean()) if strict.size else float("nan")
        for index, name in enumerate(classes):
            values = precision[:, :, index]
            values = values[values > -1]
            result[f"AP-{name}"] = _percent(values.mean()) if values.size else float("nan")
        return result


def _percent(value: float) -> float:
    return float(value) * 100 if value >= 0 else float("nan")


def _backend(name: str | None) -> tuple[Any, Any]:
    """COCO and COCOeval classes of the wanted library."""
    if name in (None, "faster-coco-eval"):
        try:
            from faster_coco_eval import COCO, COCOeval_faster

            return COCO, COCOeval_faster
        except ImportError:
            if name:
                raise
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    return COCO, COCOeval


def _tables(result: dict[str, float], classes: list[str]) -> str:
    """Overall and per-class results for reading."""
    total = tabulate(
        [[result[m] for m in (*_METRICS, "AP90")]],
        headers=[*_METRICS, "AP90"],
        floatfmt=".2f",
        tablefmt="pipe",
    )
    columns = min(3, len(classes))
    cells = list(itertools.chain(*((c, result[f"AP-{c}"]) for c in classes)))
    rows = [cells[i : i + 2 * columns] for i in range(0, len(cells), 2 * columns)]
    by_class = tabulate(rows, headers=["class", "AP"] * columns, floatfmt=".2f", tablefmt="pipe")
    return f"{total}\n\n{by_class}"
