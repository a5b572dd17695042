"""Curves over the threshold and the confusion matrix, by hand."""

import math

import numpy as np
import pytest

from dsrcnn.evaluation.errors import ImageDetections, judge
from dsrcnn.evaluation.thresholds import best_threshold, class_curves, confusion_matrix

BOX, OTHER, FAR = [0, 0, 10, 10], [50, 50, 60, 60], [80, 80, 90, 90]


def image(objects, detections, crowds=()):
    """Objects as (label, box), detections as (label, box, score), best first."""
    flags = np.array([i in crowds for i in range(len(objects))], bool)
    return ImageDetections(
        np.array([b for _, b in objects], float).reshape(-1, 4),
        np.array([c for c, _ in objects], int), flags,
        np.array([b for _, b, _ in detections], float).reshape(-1, 4),
        np.array([c for c, _, _ in detections], int),
        np.array([s for *_, s in detections], float),
    )  # fmt: skip


SCENE = image(
    [(0, BOX), (0, OTHER), (1, FAR)], [(0, BOX, 0.9), (0, FAR, 0.6), (0, OTHER, 0.5), (1, FAR, 0.4)]
)


def curves_of(*images, classes=2):
    return class_curves(images, [judge(i) for i in images], classes)


def test_precision_and_recall_follow_the_threshold():
    first, second = curves_of(SCENE)
    assert first.scores.tolist() == [0.9, 0.6, 0.5]
    assert first.precision.tolist() == pytest.approx([1, 1 / 2, 2 / 3])
    assert first.recall.tolist() == [0.5, 0.5, 1.0]
    assert first.f1.tolist() == pytest.approx([2 / 3, 1 / 2, 4 / 5])
    assert first.best == pytest.approx((0.5, 0.8))
    assert second.best == pytest.approx((0.4, 1.0))


def test_equal_scores_are_one_threshold():
    """No threshold tells the hit from the two misses of its score."""
    boxes = [(0, BOX, 0.7), (0, FAR, 0.7), (0, OTHER, 0.7), (0, FAR, 0.2)]
    (curve,) = curves_of(image([(0, BOX)], boxes), classes=1)
    assert curve.scores.tolist() == [0.7, 0.2]
    assert curve.precision.tolist() == pytest.approx([1 / 3, 1 / 4])
    assert curve.best == pytest.approx((0.7, 1 / 2))


def test_one_threshold_serves_all_classes():
    # Down to 0.4: mean F1 (0.8 + 1) / 2; down to 0.5 only 0.4.
    assert 0.05 <= best_threshold(curves_of(SCENE)) <= 0.4
    assert best_threshold(curves_of(image([], []))) == 0.3


def test_classes_without_objects_or_detections_have_no_best_threshold():
    curves = curves_of(image([(0, BOX)], [(1, BOX, 0.9)]), classes=3)
    assert all(math.isnan(curve.best[0]) for curve in curves)


@pytest.mark.parametrize(("scene", "threshold", "matrix"), [
    # The detection of class 0 on FAR is far from its class but takes the object of class 1 first;
    # the one of class 1 is then left over.
    (SCENE, 0.3, [[2, 0, 0], [1, 0, 0], [0, 1, 0]]),
    (SCENE, 0.55, [[1, 0, 1], [1, 0, 0], [0, 0, 0]]),
    (SCENE, 0.95, [[0, 0, 2], [0, 0, 1], [0, 0, 0]]),
    (image([(1, BOX)], [(0, BOX, 0.9), (0, OTHER, 0.8)]), 0.3, [[0, 0, 0], [1, 0, 0], [1, 0, 0]]),
    (image([], [(1, BOX, 0.9)]), 0.3, [[0, 0, 0], [0, 0, 0], [0, 1, 0]]),
    (image([(0, BOX)], [(0, BOX, 0.9)], crowds=[0]), 0.3, np.zeros((3, 3), int).tolist()),
    # A tenth of a crowd by area, of its class and of another; a box of which 6 in 10 are outside.
    (image([(0, BOX)], [(0, [0, 0, 10, 1], 0.9), (1, [0, 0, 10, 1], 0.9), (1, [0, 6, 10, 16], 0.5)],
           crowds=[0]), 0.3, [[0, 0, 0], [0, 0, 0], [0, 2, 0]]),
])  # fmt: skip
def test_confusion_counts_pairs_by_overlap(scene, threshold, matrix):
    assert confusion_matrix([scene], 2, threshold).tolist() == matrix
