"""Kinds of errors of detections, and how much AP each of them costs.

The kinds are those of TIDE (Bolya et al., arXiv 2008.08115, section 2.2), at an IoU of 0.5.

Notation: ``D`` detections and ``M`` objects of an image.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torchvision.ops import box_iou

KINDS = ("class", "place", "class and place", "duplicate", "background", "missed")
_FOREGROUND, _BACKGROUND = 0.5, 0.1  # IoU
_MEANING = [KINDS.index("class"), KINDS.index("place")]  # errors that explain an unmatched object
_RECALLS = np.linspace(0, 1, 101)


class ImageDetections(NamedTuple):
    """Objects and detections of an image; boxes are xyxy in pixels.

    Attributes:
        objects: (M, 4).
        classes: (M,) labels of the objects.
        crowds: (M,) bool: objects that are neither right nor wrong to detect.
        boxes: (D, 4), best first.
        labels: (D,).
        scores: (D,).
        image_id: of the annotations.
    """

    objects: np.ndarray
    classes: np.ndarray
    crowds: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    image_id: Any = None


class Judged(NamedTuple):
    """Judgment of every detection and object of an image.

    Attributes:
        correct: (D,) bool.
        ignored: (D,) bool: on a crowd.
        kind: (D,) index of `KINDS` of an error, -1 otherwise.
        target: (D,) the object that a detection means: what it matches, or the one an error should
            have matched; -1 for background.
        unmatched: (M,) bool: objects that no detection matches, crowds excluded.
        missed: (M,) bool: those of them that no error of class or place means, either.
    """

    correct: np.ndarray
    ignored: np.ndarray
    kind: np.ndarray
    target: np.ndarray
    unmatched: np.ndarray
    missed: np.ndarray


class ErrorReport(NamedTuple):
    """Errors of a dataset.

    Attributes:
        ap50: average precision at an IoU of 0.5, in percent.
        costs: percentage points by which AP50 would rise without a kind of error.
        counts: errors of each kind with a score from the threshold on, and missed objects there.
    """

    ap50: float
    costs: dict[str, float]
    counts: dict[str, int]


def collect_images(
    ground_truth: dict[str, list[Any]], detections: Iterable[dict[str, Any]], limit: int = 100
) -> list[ImageDetections]:
    """Group COCO annotations and results by image.

    Args:
        ground_truth: COCO dictionary.
        detections: COCO results: ``image_id``, ``category_id``, ``bbox`` (XYWH) and ``score``.
        limit: best detections of an image that count, of each class.
    """
    label = {c["id"]: i for i, c in enumerate(ground_truth["categories"])}
    objects, found = defaultdict(list), defaultdict(list)
    for a in ground_truth["annotations"]:
        objects[a["image_id"]].append((a["bbox"], label[a["category_id"]], bool(a.get("iscrowd"))))
    for d in detections:
        found[d["image_id"]].append((d["bbox"], label[d["category_id"]], d["score"]))
    images = []
    for image in ground_truth["images"]:
        truth = objects[image["id"]]
        best = _best_per_class(found[image["id"]], limit)
        images.append(
            ImageDetections(
                *(_boxes(truth), _column(truth, 1, int), _column(truth, 2, bool)),
                *(_boxes(best), _column(best, 1, int), _column(best, 2, float)),
                image["id"],
            )
        )
    return images


def _best_per_class(rows: Iterable[tuple[Any, ...]], limit: int) -> list[tuple[Any, ...]]:
    """Sort rows of (box, label, score) by score and keep the first `limit` of each label."""
    counts: Counter[int] = Counter()
    best = []
    for row in sorted(rows, key=lambda row: -row[2]):
        counts[row[1]] += 1
        if counts[row[1]] <= limit:
            best.append(row)
    return best


def _boxes(rows: Sequence[tuple[Any, ...]]) -> np.ndarray:
    boxes = np.array([row[0] for row in rows], float).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return boxes


def _column(rows: Sequence[tuple[Any, ...]], index: int, kind: type) -> np.ndarray:
    return np.array([row[index] for row in rows], kind)


def iou_matrix(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU (N, M) of boxes (N, 4) and (M, 4), 0 for two empty ones."""
    return np.nan_to_num(box_iou(torch.from_numpy(a), torch.from_numpy(b)).numpy())


def crowd_overlap(boxes: np.ndarray, crowds: np.ndarray) -> np.ndarray:
    """Share (N, M) of the area of boxes (N, 4) inside crowds (M, 4), 0 for empty boxes.

    COCO compares it with the threshold in place of the IoU: a crowd holds many objects, so that a
    correct box covers a small part of it.
    """
    low = np.maximum(boxes[:, None, :2], crowds[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], crowds[None, :, 2:])
    common = (high - low).clip(min=0).prod(axis=2)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    return np.asarray(common / np.where(areas > 0, areas, np.inf)[:, None])


def judge(image: ImageDetections) -> Judged:
    """Match detections to objects as COCO does, best first, and name the errors."""
    count = len(image.boxes)
    overlap = iou_matrix(image.boxes, image.objects)
    same = image.labels[:, None] == image.classes[None]
    inside = crowd_overlap(image.boxes, image.objects[image.crowds]) >= _FOREGROUND
    on_crowd = (inside & same[:, image.crowds]).any(axis=1)
    correct, ignored = np.zeros(count, bool), np.zeros(count, bool)
    target, taken = np.full(count, -1), np.zeros(len(image.objects), bool)
    for d in range(count):
        free = np.where(same[d] & ~taken & ~image.crowds, overlap[d], 0.0)
        if free.size and free.max() >= _FOREGROUND:
            target[d] = int(free.argmax())
            correct[d] = taken[target[d]] = True
        else:
            ignored[d] = on_crowd[d]
    kind = np.full(count, -1)
    real = np.where(image.crowds[None], 0.0, overlap)
    for error in np.flatnonzero(~correct & ~ignored):
        kind[error], target[error] = _kind_of(real[error], same[error])
    unmatched = ~taken & ~image.crowds
    meant = np.zeros(len(image.objects), bool)
    meant[target[np.isin(kind, _MEANING)]] = True
    return Judged(correct, ignored, kind, target, unmatched, unmatched & ~meant)


def _kind_of(overlap: np.ndarray, same: np.ndarray) -> tuple[int, int]:
    """Kind of an error with IoUs (M,), and the object it means.

    Several kinds may fit; the order in which they are tried is that of TIDE's code.
    """
    if not overlap.size:
        return KINDS.index("background"), -1
    own, other = np.where(same, overlap, 0.0), np.where(same, 0.0, overlap)
    if _BACKGROUND < own.max() < _FOREGROUND:
        return KINDS.index("place"), int(own.argmax())
    if other.max() >= _FOREGROUND:
        return KINDS.index("class"), int(other.argmax())
    if own.max() >= _FOREGROUND:
        return KINDS.index("duplicate"), int(own.argmax())
    if other.max() > _BACKGROUND:
        return KINDS.index("class and place"), int(other.argmax())
    return KINDS.index("background"), -1


def average_precision(scores: np.ndarray, correct: np.ndarray, objects: int) -> float:
    """Average precision of one class with 101 recall points, as COCO; NaN without objects."""
    if objects == 0:
        return float("nan")
    if not len(scores):
        return 0.0
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(correct[order])
    recall, precision = hits / objects, hits / np.arange(1, len(hits) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    index = np.searchsorted(recall, _RECALLS, side="left")
    return float(np.where(index < len(hits), precision[index.clip(max=len(hits) - 1)], 0).mean())


def analyze_errors(
    images: Sequence[ImageDetections],
    judged: Sequence[Judged],
    classes: int,
    threshold: float = 0.3,
) -> ErrorReport:
    """Count errors by kind and compute the AP50 that each costs.

    A kind costs what AP50 would gain if an oracle repaired its errors alone: it gives a detection
    the right class or the right box where its object is still free and drops it otherwise, drops
    the other errors, and leaves out missed objects.

    Args:
        images: of the dataset.
        judged: of each image, see `judge`.
        classes: number of classes.
        threshold: score of the errors to count.
    """
    ap50 = _mean_ap(images, judged, classes, None)
    repaired = {kind: _mean_ap(images, judged, classes, kind) for kind in KINDS}
    # Without the missed objects there may be nothing to measure.
    costs = {kind: value - ap50 if value == value else 0.0 for kind, value in repaired.items()}
    counts = dict.fromkeys(KINDS, 0)
    for image, of_image in zip(images, judged, strict=True):
        for kind, count in count_errors(image, of_image, threshold).items():
            counts[kind] += count
    return ErrorReport(ap50, costs, counts)


def count_errors(image: ImageDetections, judged: Judged, threshold: float) -> dict[str, int]:
    """Errors of an image by kind with a score from `threshold` on, and missed objects there."""
    shown = image.scores >= threshold
    counts = {k: int(((judged.kind == i) & shown).sum()) for i, k in enumerate(KINDS)}
    explained = judged.correct | np.isin(judged.kind, _MEANING)
    hit = np.zeros(len(image.objects), bool)
    hit[judged.target[explained & shown]] = True
    return {**counts, "missed": int((~hit & ~image.crowds).sum())}


def _mean_ap(
    images: Sequence[ImageDetections], judged: Sequence[Judged], classes: int, repaired: str | None
) -> float:
    """AP50 in percent, after repairing a kind of error."""
    rows = [_repair(i, j, repaired) for i, j in zip(images, judged, strict=True)]
    if not rows:
        return float("nan")
    scores, labels, correct, objects = (
        np.concatenate(column) for column in zip(*rows, strict=True)
    )
    totals = np.bincount(objects, minlength=classes)
    values = [
        average_precision(scores[labels == c], correct[labels == c], int(totals[c]))
        for c in range(classes)
    ]
    measured = [value for value in values if value == value]
    return 100 * float(np.mean(measured)) if measured else float("nan")


_Repaired = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _repair(image: ImageDetections, judged: Judged, repaired: str | None) -> _Repaired:
    """Scores, labels and correctness of the detections that remain, and labels of the objects."""
    keep, correct, labels = ~judged.ignored, judged.correct.copy(), image.labels.copy()
    objects = ~image.crowds
    if repaired == "missed":
        objects &= ~judged.missed
    elif repaired is not None:
        errors = np.flatnonzero(judged.kind == KINDS.index(repaired))
        keep[errors] = False
        if repaired in ("class", "place"):
            free = judged.unmatched.copy()
            for d in errors:  # best first
                if free[judged.target[d]]:
                    free[judged.target[d]] = False
                    keep[d] = correct[d] = True
                    labels[d] = image.classes[judged.target[d]]
    return image.scores[keep], labels[keep], correct[keep], image.classes[objects]
