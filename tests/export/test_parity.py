"""Comparison of detections: what counts as equal, and what the error says."""

from types import SimpleNamespace

import numpy as np
import pytest

from dsrcnn.errors import ExportError
from dsrcnn.export.model import _compare
from dsrcnn.export.parity import FLOAT16, FLOAT32, Tolerance, compare
from dsrcnn.utils.precision import float32_precision

BOXES = np.array([[10, 10, 50, 50], [60, 10, 90, 40], [0, 0, 5, 5]], dtype=np.float32)
SCORES = np.array([0.9, 0.6, 0.2], dtype=np.float32)
LABELS = np.array([0, 1, 1])


def test_the_largest_differences_are_returned_whatever_the_order():
    order = [1, 0, 2]
    boxes = BOXES + np.array([[0.02], [-0.05], [0.0]], dtype=np.float32)
    other = (boxes[order], (SCORES - 3e-4)[order], LABELS[order])
    parity = compare([(BOXES, SCORES, LABELS)], [other], FLOAT32)
    assert parity.pixels == pytest.approx(0.05, abs=1e-5)
    assert parity.score == pytest.approx(3e-4, abs=1e-6)
    assert parity.detections == 6  # three of each list


@pytest.mark.parametrize(("change", "text"), [
    ({"boxes": BOXES + np.array([[0], [0.2], [0]])}, r"nearest differs by 0\.2 pixels and 0"),
    ({"scores": SCORES - np.array([0, 0.01, 0])}, r"nearest differs by 0 pixels and 0\.01"),
    ({"labels": np.array([0, 0, 1])}, "lacks a detection of class 1"),
    ({"keep": [0, 2]}, "lacks a detection of class 1 with score 0.600"),
])  # fmt: skip
def test_a_detection_without_counterpart_is_an_error(change, text):
    keep = change.get("keep", [0, 1, 2])
    parts = {"boxes": BOXES, "scores": SCORES, "labels": LABELS} | change
    other = tuple(parts[name][keep] for name in ("boxes", "scores", "labels"))
    with pytest.raises(ExportError, match=text):
        compare([(BOXES, SCORES, LABELS)], [other], FLOAT32)
    with pytest.raises(ExportError, match="disagree"):
        compare([other], [(BOXES, SCORES, LABELS)], FLOAT32)


def test_what_is_nearly_the_last_of_a_list_may_be_missing():
    scores = np.array([0.9, 0.6, 0.5999], dtype=np.float32)
    boxes = BOXES + np.array([[0], [0], [9]])
    other = (boxes, scores[[0, 1, 1]], np.array([0, 1, 2]))
    assert compare([(BOXES, scores, LABELS)], [other], FLOAT32).detections == 4
    with pytest.raises(ExportError, match="disagree"):
        compare([(BOXES, SCORES, LABELS)], [(boxes, SCORES, np.array([0, 2, 1]))], FLOAT32)


def test_low_scores_are_compared_among_the_best_ten_only():
    scores = np.linspace(0.04, 0.01, 20, dtype=np.float32)
    boxes, labels = np.tile(BOXES[:1], (20, 1)), np.zeros(20, dtype=int)
    worse = scores.copy()
    worse[15] -= 0.004
    assert compare([(boxes, scores, labels)], [(boxes, worse, labels)], FLOAT32).detections == 20
    last = worse.copy()
    last[19] = 0.005  # another one was cut off
    assert compare([(boxes, scores, labels)], [(boxes, last, labels)], FLOAT32).detections == 20
    worse[5] -= 0.004
    with pytest.raises(ExportError, match="disagree"):
        compare([(boxes, scores, labels)], [(boxes, worse, labels)], Tolerance(0.1, 1e-5))


def test_half_precision_may_decide_otherwise_in_one_of_ten():
    count = 20
    boxes = np.arange(count)[:, None] * 100 + np.array([[0, 0, 50, 50]], dtype=np.float32)
    scores, labels = np.linspace(0.9, 0.5, count), np.zeros(count, dtype=int)
    one, moved = (boxes, scores, labels), boxes.copy()
    moved[:2] += 30
    parity = compare([one], [(moved, scores, labels)], FLOAT16)
    assert parity.missing == 4  # two in each direction
    moved[2] += 30
    with pytest.raises(ExportError, match=r"disagree in 6 of 40 detections"):
        compare([one], [(moved, scores, labels)], FLOAT16)


def test_a_model_that_detects_nothing_cannot_be_compared():
    nothing = (BOXES[:0], SCORES[:0], LABELS[:0])
    with pytest.raises(ExportError, match="detects nothing"):
        compare([nothing], [nothing], FLOAT32)


def test_of_few_detections_half_precision_may_decide_one_otherwise():
    boxes = np.arange(4)[:, None] * 100 + np.array([[0, 0, 50, 50]], dtype=np.float32)
    scores, labels = np.linspace(0.9, 0.5, 4), np.zeros(4, dtype=int)
    one, moved = (boxes, scores, labels), boxes.copy()
    moved[0] += 30
    assert compare([one], [(moved, scores, labels)], FLOAT16).missing == 2
    with pytest.raises(ExportError, match="disagree in 2 of 8"):
        compare([one], [(moved, scores, labels)], FLOAT32)
    moved[1] += 30
    with pytest.raises(ExportError, match="disagree in 4 of 8"):
        compare([one], [(moved, scores, labels)], FLOAT16)


def test_boxes_are_compared_in_pixels_of_the_network_and_without_tf32():
    seen = []

    def detect(image, shift=0.0):
        seen.append(float32_precision())
        return BOXES + np.float32(shift), SCORES, LABELS

    info = SimpleNamespace(height=64, width=96, half=False, dynamic_batch=False)
    session = SimpleNamespace(info=info, run=lambda images: [detect(images[0], 0.5)])
    before = float32_precision()
    large = np.zeros((400, 400, 3), np.uint8)  # 0.16 pixels of the network each
    assert _compare(detect, session, [large]).pixels == pytest.approx(0.5 * 0.16, rel=1e-3)
    assert set(seen) <= {("ieee", "ieee"), ("highest", "False")}  # before torch 2.9
    assert before == float32_precision()
    with pytest.raises(ExportError, match=r"0\.1 pixels of the network input"):
        _compare(detect, session, [large[:100, :100]])
