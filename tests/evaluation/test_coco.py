"""COCO metrics by hand, equal in both libraries."""

import logging
import math
import sys

import numpy as np
import pytest
from coco_cases import (
    METRICS,
    NAME,
    OBJECT,
    evaluate,
    evaluate_one,
    image_of,
    jittered,
    output_of,
    perfect,
    register,
)

from dsrcnn.data.datasets.shapes import CLASSES, shapes_records
from dsrcnn.evaluation import CocoEvaluator


@pytest.fixture(params=["faster-coco-eval", "pycocotools"])
def _backend(request, monkeypatch):
    """Compute by one of the libraries, then by the other."""
    if request.param == "pycocotools":
        monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    else:
        pytest.importorskip("faster_coco_eval")


@pytest.mark.usefixtures("_backend")
def test_perfect_predictions_have_an_ap_of_100():
    records = shapes_records("val")[:12]
    register(records)
    result = evaluate(records, map(perfect, records))
    present = {CLASSES[a["category_id"]] for r in records for a in r["annotations"]}
    assert len(present) == 5
    for name in ("AP", "AP50", "AP75", *(f"AP-{c}" for c in present)):
        assert result[name] == pytest.approx(100)
    assert list(result) == [*METRICS, *(f"AP-{c}" for c in CLASSES)]


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize(("detections", "ap50", "ap75", "ap", "large"), [
    # Two at the same place: the one with the higher score is right, the other false.
    ([(0, 0.9, *OBJECT[1:]), (0, 0.8, *OBJECT[1:])], 100, 100, 100, 100),
    # The false one comes first: full recall is reached at a precision of 1/2. Among large
    # objects a false detection of medium size is ignored.
    ([(0, 0.9, 150, 150, 190, 190), (0, 0.8, *OBJECT[1:])], 50, 50, 50, 100),
    # 100 x 62.5 of 100 x 100: IoU 0.625, right at 0.50, 0.55, 0.60 of ten thresholds.
    ([(0, 0.9, 10, 10, 110, 72.5)], 100, 0, 30, 30),
    # The better box has the lower score: below 0.625 the loose one takes the object, above it
    # the better one, which then comes second: (3 x 1 + 7 x 1/2) / 10. The loose one is medium.
    ([(0, 0.9, 10, 10, 110, 72.5), (0, 0.8, *OBJECT[1:])], 100, 50, 65, 100),
    ([(1, 0.9, *OBJECT[1:])], 0, 0, 0, 0),  # another class
], ids=["twice", "false first", "loose", "both", "another class"])  # fmt: skip
def test_metrics_of_one_object_are_those_computed_by_hand(detections, ap50, ap75, ap, large):
    result = evaluate_one([OBJECT], detections)
    expected = {"AP50": ap50, "AP75": ap75, "AP": ap, "APl": large, "AP-one": ap}
    assert {k: result[k] for k in expected} == pytest.approx(expected)
    assert all(math.isnan(result[k]) for k in ("APs", "APm", "AP-two"))  # nothing to measure


@pytest.mark.parametrize(("bottom", "expected"), [(103, 100), (98, 0)])
def test_ap90_counts_nearly_exact_boxes(bottom, expected):
    # 93 or 88 of 100 pixels of the height: IoU 0.93, right up to 0.9, and 0.88.
    result = evaluate_one([OBJECT], [(0, 0.9, 10, 10, 110, bottom)])
    assert result["AP90"] == pytest.approx(expected)


@pytest.mark.usefixtures("_backend")
def test_recall_counts_the_best_detections_of_an_image():
    """Twelve objects, detected exactly, the first with the best score."""
    objects = [(0, 12 * i, 12 * i, 12 * i + 10, 12 * i + 10) for i in range(12)]
    detections = [(0, 0.9 - 0.01 * i, *box) for i, (_, *box) in enumerate(objects)]
    result = evaluate_one(objects, detections)
    recalls = [result[k] for k in ("AR1", "AR10", "AR100")]
    assert recalls == pytest.approx([100 / 12, 1000 / 12, 100])


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize(("limit", "ap", "recalls"), [
    # Of 120 objects of 1 pixel a hundred count: 84 of 101 recall points up to 100 / 120.
    (100, 84 / 101, {"AR1": 1 / 120, "AR10": 10 / 120, "AR100": 100 / 120}),
    (300, 1.0, {"AR1": 1 / 120, "AR10": 10 / 120, "AR100": 100 / 120, "AR300": 1.0}),
    (5, 5 / 101, {"AR1": 1 / 120, "AR5": 5 / 120}),
])  # fmt: skip
def test_crowds_need_a_higher_limit_of_detections(limit, ap, recalls):
    objects = [(0, x, y, x + 5, y + 5) for x in range(0, 144, 12) for y in range(0, 120, 12)]
    detections = [(0, 0.9 - 0.001 * i, *box) for i, (_, *box) in enumerate(objects)]
    result = evaluate_one(objects, detections, max_detections=limit)
    assert result["AP"] == pytest.approx(100 * ap)
    assert {k: v for k, v in result.items() if k.startswith("AR")} == pytest.approx(
        {k: 100 * v for k, v in recalls.items()}
    )


def test_half_of_the_objects_detected_gives_51_of_101_recall_points():
    # Precision is 1 at recalls 0, 0.01, ..., 0.5 and 0 beyond.
    result = evaluate_one([OBJECT, (0, 120, 120, 190, 190)], [(0, 0.9, *OBJECT[1:])])
    assert result["AP"] == pytest.approx(100 * 51 / 101)


def test_ap_is_the_mean_over_classes_and_sizes_have_their_own():
    small, medium = (0, 5, 5, 15, 15), (1, 20, 20, 70, 70)  # 10 x 10 and 50 x 50 pixels
    result = evaluate_one([small, medium], [(1, 0.9, *medium[1:])])
    expected = {"AP-one": 0, "AP-two": 100, "AP": 50, "APs": 0, "APm": 100}
    assert {k: result[k] for k in expected} == pytest.approx(expected)
    assert math.isnan(result["APl"])


def test_a_detection_on_a_crowd_is_not_counted():
    record = image_of([(0, 120, 120, 190, 190), OBJECT])
    record["annotations"][1]["iscrowd"] = 1
    register([record], ["one"])
    assert evaluate([record], [perfect(record)])["AP"] == pytest.approx(100)


def test_a_reset_clears_detections():
    record = image_of([OBJECT])
    register([record], ["one"])
    evaluator = CocoEvaluator(NAME)
    evaluator.process([record], [output_of(record, [(0, 0.9, 150, 150, 190, 190)])])
    evaluator.reset()
    evaluator.process([record], [output_of(record, [(0, 0.8, *OBJECT[1:])])])
    assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100)


def test_no_detections_give_nan_and_a_warning(messages, caplog):
    caplog.set_level(logging.WARNING, "dsrcnn")
    result = evaluate_one([OBJECT], [])
    assert list(result) == [*METRICS, "AP-one", "AP-two"]
    assert all(math.isnan(v) for v in result.values())
    assert messages() == [f"{NAME}: the model made no detections."]


def test_both_libraries_give_the_same_numbers(monkeypatch):
    pytest.importorskip("faster_coco_eval")
    generator = np.random.default_rng(0)
    records = shapes_records("val")[:30]
    records[3]["annotations"][0]["iscrowd"] = 1
    register(records)
    detections = [jittered(r, generator) for r in records]
    fast = evaluate(records, detections)
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    slow = evaluate(records, detections)
    assert fast == pytest.approx(slow, rel=1e-9, nan_ok=True)
    assert 5 < slow["AP"] < slow["AP50"] < 95  # a case that could differ
    assert not math.isnan(slow["APs"])
