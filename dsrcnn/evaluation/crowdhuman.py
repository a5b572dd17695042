"""CrowdHuman's metrics: AP, log-average miss rate (mMR), recall and Jaccard index (JI)."""

import itertools
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from scipy.optimize import linear_sum_assignment

from ..data.datasets.coco import read_coco_json
from .files import write_detections

_IOU = 0.5
_EPSILON = 1e-6
_FPPI = np.array([0.0100, 0.0178, 0.0316, 0.0562, 0.1000, 0.1778, 0.3162, 0.5623, 1.0000])
_JACCARD_SCORES = np.arange(10) / 10


class CrowdImage(NamedTuple):
    """Persons and detections of an image.

    Width and height are in pixels, and so are boxes.
    """

    width: int
    height: int
    persons: np.ndarray  # (M, 4) xyxy, regions to ignore included
    ignored: np.ndarray  # (M,) bool, True for regions to ignore
    detections: np.ndarray  # (K, 4) xyxy
    scores: np.ndarray  # (K,)


def crowdhuman_metrics(images: Sequence[CrowdImage]) -> dict[str, float]:
    """Compute all metrics over all images of a dataset; smaller is better for ``mMR``.

    Returns:
        ``AP``, ``mMR``, ``Recall`` and ``JI`` in percent; NaN where there is no person.
    """
    images = [_clip_and_sort(image) for image in images]
    persons = sum(int((~image.ignored).sum()) for image in images)
    if not persons:
        return dict.fromkeys(("AP", "mMR", "Recall", "JI"), float("nan"))
    matches = [match_image(image) for image in images]
    pairs = zip(images, matches, strict=True)
    scores = np.concatenate([image.scores[counted] for image, (counted, _) in pairs])
    correct = np.concatenate([correct[counted] for counted, correct in matches])
    correct = correct[np.argsort(-scores, kind="stable")]
    true, false = np.cumsum(correct), np.cumsum(~correct)
    recall, precision = true / persons, true / np.maximum(true + false, 1)
    area = ((recall[1:] - recall[:-1]) * (precision[1:] + precision[:-1]) / 2).sum()
    return {
        "AP": 100 * float(area),
        "mMR": 100 * _log_average_miss_rate(recall, false / len(images)),
        "Recall": 100 * float(recall[-1]) if len(recall) else 0.0,
        "JI": 100 * jaccard_index(images),
    }


def _log_average_miss_rate(recall: np.ndarray, fppi: np.ndarray) -> float:
    """Geometric mean of the miss rates at nine rates of false positives per image."""
    if not len(recall):
        return 1.0
    ranks = np.minimum(np.searchsorted(fppi, _FPPI, side="left"), len(fppi) - 1)
    missed = np.maximum(1 - recall[ranks], 1e-10)  # a rate of zero has no logarithm
    return float(np.exp(np.log(missed).mean()))


def match_image(image: CrowdImage) -> tuple[np.ndarray, np.ndarray]:
    """Match detections with persons by descending score, as the Caltech evaluation does.

    A detection is matched with the free person of the largest IoU, if above 0.5. Unmatched
    detections do not count if more than half of their area lies in a region to ignore. Detections
    must be sorted by score, and regions to ignore come after persons.

    Returns:
        Two (K,) bool arrays: detections that count, and detections that are correct.
    """
    persons = int((~image.ignored).sum())
    ious, within = _overlaps(image.detections, image.persons)
    counted = np.ones(len(image.detections), bool)
    correct = np.zeros(len(image.detections), bool)
    free = np.ones(persons, bool)
    for index in range(len(image.detections)):
        overlaps = np.where(free, ious[index, :persons], 0.0)
        if persons and overlaps.max() > _IOU:
            free[overlaps.argmax()] = False
            correct[index] = True
        else:
            counted[index] = not (within[index, persons:] > _IOU).any()
    return counted, correct


def jaccard_index(images: Sequence[CrowdImage]) -> float:
    """Maximum over score thresholds of the mean ``matches / (detections + persons - matches)``.

    Matching maximizes the number of pairs with an IoU of at least 0.5. Unmatched detections do not
    count if more than half of their area lies in a region to ignore.
    """
    return float(np.mean([_jaccard_by_threshold(image) for image in images], axis=0).max())


def _jaccard_by_threshold(image: CrowdImage) -> list[float]:
    persons = int((~image.ignored).sum())
    ious, within = _overlaps(image.detections, image.persons)
    pairs: np.ndarray = ious[:, :persons] >= _IOU
    in_region = np.asarray((within[:, persons:] > _IOU).any(axis=1))
    indices = []
    for score in _JACCARD_SCORES:
        kept = image.scores >= score
        rows, columns = linear_sum_assignment(pairs[kept], maximize=True)
        matched = pairs[kept][rows, columns]
        counted = ~in_region[kept]
        counted[rows[matched]] = True
        matches = int(matched.sum())
        total = int(counted.sum()) + persons - matches
        indices.append(matches / total if total else 1.0)
    return indices


def _overlaps(detections: np.ndarray, persons: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """IoU, and share of each detection that lies in each box: both (K, M)."""
    low = np.maximum(detections[:, None, :2], persons[None, :, :2])
    high = np.minimum(detections[:, None, 2:], persons[None, :, 2:])
    common = np.clip(high - low, 0, None).prod(axis=2)
    areas, areas_persons = ((b[:, 2:] - b[:, :2]).prod(axis=1) for b in (detections, persons))
    iou = common / (areas[:, None] + areas_persons[None] - common + _EPSILON)
    return iou, common / (areas[:, None] + _EPSILON)


def _clip_and_sort(image: CrowdImage) -> CrowdImage:
    """Clip boxes to the image and sort them, as `match_image` needs them."""
    width, height, persons, ignored, detections, scores = image
    if len(detections):  # without, boxes stay as they are, as in the published code
        limits = [width - 1, height - 1, width, height]
        persons, detections = np.clip(persons, 0, limits), np.clip(detections, 0, limits)
    order, by_kind = (np.argsort(x, kind="stable") for x in (-scores, ignored))
    persons, ignored = persons[by_kind], ignored[by_kind]
    return CrowdImage(width, height, persons, ignored, detections[order], scores[order])


class CrowdHumanEvaluator(DatasetEvaluator):
    """AP, mMR, recall and JI over the detections of all processes, every image once.

    The detections go to ``detections.json`` in `output_folder`, if there is one.

    Raises:
        DataError: if the ``json_file`` of the dataset is missing or broken.
    """

    def __init__(self, name: str, output_folder: str | Path | None = None) -> None:
        self.name = name
        self.output_folder = Path(output_folder) if output_folder else None
        content = read_coco_json(MetadataCatalog.get(name).json_file)
        self._images = {image["id"]: image for image in content.images}
        self._annotations: dict[Any, list[dict]] = defaultdict(list)
        for annotation in content.annotations:
            self._annotations[annotation["image_id"]].append(annotation)
        self._detections: dict[Any, tuple[list, list]] = {}

    def reset(self) -> None:
        """Clear the detections."""
        self._detections = {}

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Collect the ``instances`` of a batch."""
        for record, output in zip(inputs, outputs, strict=True):
            instances = output["instances"].to("cpu")
            boxes = instances.pred_boxes.tensor.tolist()
            self._detections[record["image_id"]] = (boxes, instances.scores.tolist())

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Gather the detections of all processes and compute the metrics on the main process.

        Returns:
            ``{"bbox": {"AP", "mMR", "Recall", "JI"}}`` in percent; empty on other processes.
        """
        gathered = comm.gather(self._detections)
        if not comm.is_main_process():
            return {}
        # By image: samplers may repeat images to give all processes the same number.
        detections = dict(itertools.chain(*(part.items() for part in gathered)))
        if self.output_folder:
            content = {str(k): v for k, v in detections.items()}
            write_detections(self.output_folder / "detections.json", content)
        images = [self._image(i, *detections.get(i, ([], []))) for i in self._images]
        return OrderedDict(bbox=crowdhuman_metrics(images))

    def _image(self, number: Any, boxes: list, scores: list) -> CrowdImage:
        image, annotations = self._images[number], self._annotations[number]
        annotations = [a for a in annotations if np.isfinite(a["bbox"]).all()]
        persons = np.array([a["bbox"] for a in annotations], dtype=float).reshape(-1, 4)
        persons[:, 2:] += persons[:, :2]
        ignored = np.array([bool(a["iscrowd"]) for a in annotations], dtype=bool)
        detections = np.array(boxes, dtype=float).reshape(-1, 4)
        sizes = (image["width"], image["height"])
        return CrowdImage(*sizes, persons, ignored, detections, np.array(scores, dtype=float))
