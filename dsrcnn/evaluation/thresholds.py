"""Precision, recall and F1 over the score threshold, and confusion of classes.

At an IoU of 0.5, from detections judged by `errors.judge`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .errors import ImageDetections, Judged, crowd_overlap, iou_matrix


class ClassCurve(NamedTuple):
    """Curves of a class over the scores of its detections, from the best one down.

    Attributes:
        scores: (D,) descending, all different: thresholds.
        precision: (D,) of the detections from each threshold on.
        recall: (D,).
        objects: number of objects of the class.
    """

    scores: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    objects: int

    @property
    def f1(self) -> np.ndarray:
        """Harmonic mean of precision and recall, (D,)."""
        total = self.precision + self.recall
        return np.asarray(2 * self.precision * self.recall / np.maximum(total, 1e-12))

    @property
    def best(self) -> tuple[float, float]:
        """The threshold with the largest F1, and that F1; NaN without detections or objects."""
        if not len(self.scores) or not self.objects:
            return float("nan"), float("nan")
        index = int(self.f1.argmax())
        return float(self.scores[index]), float(self.f1[index])


def class_curves(
    images: Sequence[ImageDetections], judged: Sequence[Judged], classes: int
) -> list[ClassCurve]:
    """Compute the curves of every class."""
    pairs = list(zip(images, judged, strict=True))
    scores = np.concatenate([i.scores[~j.ignored] for i, j in pairs] or [np.zeros(0)])
    labels = np.concatenate([i.labels[~j.ignored] for i, j in pairs] or [np.zeros(0, int)])
    correct = np.concatenate([j.correct[~j.ignored] for i, j in pairs] or [np.zeros(0, bool)])
    objects = np.concatenate([i.classes[~i.crowds] for i in images] or [np.zeros(0, int)])
    return [
        _curve(scores[labels == c], correct[labels == c], int((objects == c).sum()))
        for c in range(classes)
    ]


def _curve(scores: np.ndarray, correct: np.ndarray, objects: int) -> ClassCurve:
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(correct[order])
    precision = hits / np.arange(1, len(hits) + 1)
    scores = scores[order]
    is_last = np.diff(scores, append=-1) != 0  # of equal ones
    recall = hits / max(objects, 1)
    return ClassCurve(scores[is_last], precision[is_last], recall[is_last], objects)


def best_threshold(curves: Sequence[ClassCurve]) -> float:
    """The one threshold with the largest mean F1 of the classes with objects; 0.3 without any."""
    measured = [curve for curve in curves if curve.objects and len(curve.scores)]
    if not measured:
        return 0.3
    thresholds = np.linspace(0.05, 0.95, 91)
    means = np.mean([_f1_at(curve, thresholds) for curve in measured], axis=0)
    return float(thresholds[means.argmax()])


def _f1_at(curve: ClassCurve, thresholds: np.ndarray) -> np.ndarray:
    counts = np.searchsorted(-curve.scores, -thresholds, side="right")
    return np.asarray(np.where(counts > 0, curve.f1[(counts - 1).clip(min=0)], 0.0))


def confusion_matrix(
    images: Sequence[ImageDetections], classes: int, threshold: float
) -> np.ndarray:
    """Count which classes objects are detected as.

    Every object takes the free detection, of any class, with the largest IoU from 0.5 on.

    Args:
        images: of the dataset.
        classes: ``C``.
        threshold: least score of detections.

    Returns:
        (C + 1, C + 1): rows are classes of objects, columns those of detections; the last row
        counts detections of no object, the last column objects that are missed.
    """
    matrix = np.zeros((classes + 1, classes + 1), int)
    for image in images:
        shown = image.scores >= threshold
        boxes, labels = image.boxes[shown], image.labels[shown]
        overlap = iou_matrix(boxes, image.objects)
        overlap[:, image.crowds] = 0
        is_inside = crowd_overlap(boxes, image.objects[image.crowds]) >= 0.5
        # As in COCO, a crowd excuses detections of its own class only.
        on_crowd = (is_inside & (labels[:, None] == image.classes[image.crowds])).any(axis=1)
        free_boxes, free_objects = np.ones(len(boxes), bool), ~image.crowds
        for flat in np.argsort(-overlap, axis=None, kind="stable"):
            d, m = divmod(int(flat), max(overlap.shape[1], 1))
            if overlap[d, m] < 0.5:
                break
            if free_boxes[d] and free_objects[m]:
                free_boxes[d] = free_objects[m] = False
                matrix[image.classes[m], labels[d]] += 1
        np.add.at(matrix[-1], labels[free_boxes & ~on_crowd], 1)
        np.add.at(matrix[:, -1], image.classes[free_objects], 1)
    return matrix
