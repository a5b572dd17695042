"""The evaluator of CrowdHuman."""

import itertools
import json
import logging
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from tabulate import tabulate

from ..data.datasets.coco_json import read_coco_json
from .crowdhuman_metrics import CrowdImage, crowdhuman_metrics

__all__ = ["CrowdHumanEvaluator"]

_LOGGER = logging.getLogger(__name__)


class CrowdHumanEvaluator(DatasetEvaluator):
    """AP, mMR, recall and JI over all detections of all processes, every image once."""

    def __init__(self, name: str, output_folder: str | Path | None = None) -> None:
        """Read the ground truth.

        Args:
            name: data set with ``json_file``.
            output_folder: where detections are written; None for not.

        Raises:
            DataError: if the json is missing or broken.
        """
        self.name = name
        self.output_folder = Path(output_folder) if output_folder else None
        content = read_coco_json(MetadataCatalog.get(name).json_file)
        self._images = {image["id"]: image for image in content["images"]}
        self._annotations: dict[Any, list[dict]] = defaultdict(list)
        for annotation in content["annotations"]:
            self._annotations[annotation["image_id"]].append(annotation)
        self._detections: dict[Any, tuple[list, list]] = {}

    def reset(self) -> None:
        """Forget all detections."""
        self._detections = {}

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Take the detections of images in."""
        for record, output in zip(inputs, outputs, strict=True):
            found = output["instances"].to("cpu")
            boxes = found.pred_boxes.tensor.tolist()
            self._detections[record["image_id"]] = (boxes, found.scores.tolist())

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Gather from all processes and compute the metrics on the main one.

        Returns:
            ``{"bbox": {"AP", "mMR", "Recall", "JI"}}`` in percent; empty on other processes.
        """
        gathered = comm.gather(self._detections)
        if not comm.is_main_process():
            return {}
        # By image: samplers repeat images so that all processes have as many.
        found = dict(itertools.chain(*(part.items() for part in gathered)))
        if self.output_folder:
            self.output_folder.mkdir(parents=True, exist_ok=True)
            path = self.output_folder / "detections.json"
            path.write_text(json.dumps({str(k): v for k, v in found.items()}))
        result = crowdhuman_metrics([self._image(i, *found.get(i, ([], []))) for i in self._images])
        table = tabulate([list(result.values())], list(result), floatfmt=".2f", tablefmt="pipe")
        _LOGGER.info("%s:\n%s", self.name, table)
        return OrderedDict(bbox=result)

    def _image(self, number: Any, boxes: list, scores: list) -> CrowdImage:
        image, annotations = self._images[number], self._annotations[number]
        persons = np.array([a["bbox"] for a in annotations], dtype=float).reshape(-1, 4)
        persons[:, 2:] += persons[:, :2]
        return CrowdImage(
            image["width"],
            image["height"],
            persons,
            np.array([bool(a.get("iscrowd", 0)) for a in annotations], dtype=bool),
            np.array(boxes, dtype=float).reshape(-1, 4),
            np.array(scores, dtype=float),
        )
