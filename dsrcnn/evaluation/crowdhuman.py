"""The evaluator of CrowdHuman."""

import itertools
import json
import logging
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from scipy.optimize import linear_sum_assignment
from tabulate import tabulate

from ..data.datasets.coco import read_coco_json

__all__ = [
    "CrowdHumanEvaluator",
    "CrowdImage",
    "crowdhuman_metrics",
    "jaccard_index",
    "match_image",
]

_IOU = 0.5
_EPSILON = 1e-6
_FPPI = np.array([0.0100, 0.0178, 0.0316, 0.0562, 0.1000, 0.1778, 0.3162, 0.5623, 1.0000])
_JACCARD_SCORES = np.arange(10) / 10


class CrowdImage(NamedTuple):
    """An image with its persons and detections; boxes are xyxy in pixels.

    Attributes:
        width: of the image.
        height: of the image.
        persons: (M, 4).
        ignored: (M,) bool, regions in which detections do not count.
        detections: (K, 4).
        scores: (K,).
    """

    width: int
    height: int
    persons: np.ndarray
    ignored: np.ndarray
    detections: np.ndarray
    scores: np.ndarray


def crowdhuman_metrics(images: Sequence[CrowdImage]) -> dict[str, float]:
    """All metrics over a data set, in percent; smaller is better for ``mMR``.

    Args:
        images: all of them, those without detections too.

    Returns:
        ``AP``, ``mMR``, ``Recall`` and ``JI``; NaN where there is no person.
    """
    images = [_sorted(_clipped(image)) for image in images]
    persons = sum(int((~image.ignored).sum()) for image in images)
    if not persons:
        return dict.fromkeys(("AP", "mMR", "Recall", "JI"), float("nan"))
    matched = [match_image(image) for image in images]
    pairs = list(zip(images, matched, strict=True))
    scores = np.concatenate([image.scores[counts] for image, (counts, _) in pairs])
    right = np.concatenate([found[kept] for kept, found in matched])
    order = np.argsort(-scores, kind="stable")
    true = np.cumsum(right[order])
    false = np.cumsum(~right[order])
    recall, precision = true / persons, true / np.maximum(true + false, 1)
    area = ((recall[1:] - recall[:-1]) * (precision[1:] + precision[:-1]) / 2).sum()
    return {
        "AP": 100 * float(area),
        "mMR": 100 * _log_average_miss_rate(recall, false / len(images)),
        "Recall": 100 * float(recall[-1]) if len(recall) else 0.0,
        "JI": 100 * jaccard_index(images),
    }


def _log_average_miss_rate(recall: np.ndarray, fppi: np.ndarray) -> float:
    """Geometric mean of the miss rates at nine numbers of false positives per image."""
    if not len(recall):
        return 1.0
    places = np.minimum(np.searchsorted(fppi, _FPPI, side="left"), len(fppi) - 1)
    missed = np.maximum(1 - recall[places], 1e-10)  # a rate of zero has no logarithm
    return float(np.exp(np.log(missed).mean()))


def match_image(image: CrowdImage) -> tuple[np.ndarray, np.ndarray]:
    """Match detections with persons, the best score first, as Caltech's evaluation does.

    A detection takes the free person that it overlaps most, by an IoU above 0.5; else it is left
    out if more than half of it lies in a region to ignore.

    Args:
        image: sorted: detections by score, regions to ignore behind persons.

    Returns:
        For every detection whether it counts, and whether it is right; both (K,) bool.
    """
    real = int((~image.ignored).sum())
    ious, within = _overlaps(image.detections, image.persons)
    counts = np.ones(len(image.detections), bool)
    right = np.zeros(len(image.detections), bool)
    free = np.ones(real, bool)
    for index in range(len(image.detections)):
        overlaps = np.where(free, ious[index, :real], 0.0)
        if real and overlaps.max() > _IOU:
            free[overlaps.argmax()] = False
            right[index] = True
        else:
            counts[index] = not (within[index, real:] > _IOU).any()
    return counts, right


def jaccard_index(images: Sequence[CrowdImage]) -> float:
    """Best over score thresholds of the mean ``matches / (detections + persons - matches)``.

    As many pairs as possible with an IoU of at least 0.5 are matched. Detections that are in none
    and lie more than half in a region to ignore do not count.
    """
    return float(np.mean([_jaccards_of(image) for image in images], axis=0).max())


def _jaccards_of(image: CrowdImage) -> list[float]:
    """Of one image, at every threshold."""
    real = int((~image.ignored).sum())
    ious, within = _overlaps(image.detections, image.persons)
    pairs: np.ndarray = ious[:, :real] >= _IOU
    inside = np.asarray((within[:, real:] > _IOU).any(axis=1))
    found = []
    for score in _JACCARD_SCORES:
        chosen = image.scores >= score
        rows, columns = linear_sum_assignment(pairs[chosen], maximize=True)
        good = pairs[chosen][rows, columns]
        counted = ~inside[chosen]
        counted[rows[good]] = True
        total = int(counted.sum()) + real - int(good.sum())
        found.append(int(good.sum()) / total if total else 1.0)
    return found


def _overlaps(detections: np.ndarray, persons: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """IoU, and share of each detection that lies in each box: both (K, M)."""
    low = np.maximum(detections[:, None, :2], persons[None, :, :2])
    high = np.minimum(detections[:, None, 2:], persons[None, :, 2:])
    common = np.clip(high - low, 0, None).prod(axis=2)
    own, other = ((b[:, 2:] - b[:, :2]).prod(axis=1) for b in (detections, persons))
    iou = common / (own[:, None] + other[None] - common + _EPSILON)
    return iou, common / (own[:, None] + _EPSILON)


def _clipped(image: CrowdImage) -> CrowdImage:
    """Boxes inside the image, those of images without detections as they are, as published."""
    if not len(image.detections):
        return image
    low = [image.width - 1, image.height - 1]
    limits = [*low, image.width, image.height]
    persons, detections = (np.clip(b, 0, limits) for b in (image.persons, image.detections))
    return image._replace(persons=persons, detections=detections)


def _sorted(image: CrowdImage) -> CrowdImage:
    order = np.argsort(-image.scores, kind="stable")
    persons = np.argsort(image.ignored, kind="stable")
    return image._replace(
        persons=image.persons[persons],
        ignored=image.ignored[persons],
        detections=image.detections[order],
        scores=image.scores[order],
    )


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
