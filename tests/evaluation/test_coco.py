"""COCO metrics: worked out by hand, and equal in both libraries."""

import logging
import math

import numpy as np
import pytest
from coco_cases import (
    METRICS,
    NAME,
    OBJECT,
    evaluate,
    image_of,
    jittered,
    measured_by_hand,
    output_of,
    perfect,
    register,
)

from dsrcnn.data.datasets.shapes import CLASSES, shapes_records
from dsrcnn.evaluation import CocoEvaluator

pytestmark = pytest.mark.usefixtures("clean_catalogs")


@pytest.fixture
def messages(caplog, monkeypatch):
    """Warnings of this package; set up loggers no longer propagate, so ours is made to."""
    monkeypatch.setattr(logging.getLogger("dsrcnn"), "propagate", True)
    return lambda: [
        r.getMessage()
        for r in caplog.records
        if r.name.startswith("dsrcnn") and r.levelno >= logging.WARNING
    ]


# Values


@pytest.mark.parametrize("backend", ["faster-coco-eval", "pycocotools"])
def test_perfect_predictions_have_an_ap_of_100(backend):
    if backend == "faster-coco-eval":
        pytest.importorskip("faster_coco_eval")
    records = shapes_records("val")[:12]
    register(records)
    result = evaluate(records, map(perfect, records), backend=backend)
    present = {CLASSES[a["category_id"]] for r in records for a in r["annotations"]}
    assert len(present) == 5
    for name in ("AP", "AP50", "AP75", *(f"AP-{c}" for c in present)):
        assert result[name] == pytest.approx(100)


@pytest.mark.parametrize(
    ("detections", "ap50", "ap75", "ap", "large"),
    [
        # Two found at the same place: the one with the higher score counts, the other is false.
        pytest.param(
            [(0, 0.9, 10, 10, 110, 110), (0, 0.8, 10, 10, 110, 110)], 100, 100, 100, 100, id="twice"
        ),
        # The false one comes first: full recall is reached at a precision of 1/2. Among large
        # objects a false detection of medium size is ignored.
        pytest.param(
            [(0, 0.9, 150, 150, 190, 190), (0, 0.8, 10, 10, 110, 110)], 50, 50, 50, 100, id="2nd"
        ),
        # 100 x 62.5 of 100 x 100: IoU 0.625, right at 0.50, 0.55, 0.60 of ten thresholds.
        pytest.param([(0, 0.9, 10, 10, 110, 72.5)], 100, 0, 30, 30, id="loose"),
        # The better box has the lower score: below 0.625 the loose one takes the object, above it
        # the better one, which then comes second: (3 x 1 + 7 x 1/2) / 10. The loose one is medium.
        pytest.param(
            [(0, 0.9, 10, 10, 110, 72.5), (0, 0.8, 10, 10, 110, 110)], 100, 50, 65, 100, id="both"
        ),
        pytest.param([(1, 0.9, 10, 10, 110, 110)], 0, 0, 0, 0, id="another class"),
    ],
)
@pytest.mark.parametrize("backend", ["faster-coco-eval", "pycocotools"])
def test_one_object_is_measured_as_by_hand(detections, ap50, ap75, ap, large, backend):
    if backend == "faster-coco-eval":
        pytest.importorskip("faster_coco_eval")
    result = measured_by_hand([OBJECT], detections, backend=backend)
    found = {k: result[k] for k in ("AP50", "AP75", "AP", "APl", "AP-one")}
    expected = {"AP50": ap50, "AP75": ap75, "AP": ap, "APl": large, "AP-one": ap}
    assert found == pytest.approx(expected)
    for nothing_to_measure in ("APs", "APm", "AP-two"):
        assert math.isnan(result[nothing_to_measure])


@pytest.mark.parametrize(("bottom", "expected"), [(103, 100), (98, 0)])
def test_ap90_is_that_of_nearly_exact_boxes(bottom, expected):
    # 93 or 88 of 100 pixels of the height: IoU 0.93, right up to 0.9, and 0.88.
    result = measured_by_hand([OBJECT], [(0, 0.9, 10, 10, 110, bottom)])
    assert result["AP90"] == pytest.approx(expected)


def test_half_of_the_objects_found_gives_51_of_101_recall_points():
    # Precision is 1 at recalls 0, 0.01, ..., 0.5 and 0 beyond.
    objects = [OBJECT, (0, 120, 120, 190, 190)]
    result = measured_by_hand(objects, [(0, 0.9, *OBJECT[1:])])
    assert result["AP"] == pytest.approx(100 * 51 / 101)


def test_the_mean_is_over_classes_and_sizes_are_told_apart():
    small, medium = (0, 5, 5, 15, 15), (1, 20, 20, 70, 70)  # 10 x 10 and 50 x 50 pixels
    result = measured_by_hand([small, medium], [(1, 0.9, *medium[1:])])
    assert result["AP-one"] == 0
    assert result["AP-two"] == pytest.approx(100)
    assert result["AP"] == pytest.approx(50)
    assert (result["APs"], result["APm"]) == (0, pytest.approx(100))
    assert math.isnan(result["APl"])


def test_a_detection_on_a_crowd_is_not_counted():
    crowd = {**image_of([OBJECT])["annotations"][0], "iscrowd": 1}
    record = image_of([(0, 120, 120, 190, 190)])
    record["annotations"].append(crowd)
    register([record], ["one"])
    on_crowd, found = (0, 0.9, *OBJECT[1:]), (0, 0.8, 120, 120, 190, 190)
    assert evaluate([record], [[on_crowd, found]])["AP"] == pytest.approx(100)


def test_the_result_names_totals_then_classes():
    records = shapes_records("val")[:3]
    register(records)
    result = evaluate(records, map(perfect, records))
    assert list(result) == [*METRICS, *(f"AP-{c}" for c in CLASSES)]


def test_a_reset_forgets_detections():
    record = image_of([OBJECT])
    register([record], ["one"])
    evaluator = CocoEvaluator(NAME)
    evaluator.process([record], [output_of(record, [(0, 0.9, 150, 150, 190, 190)])])
    evaluator.reset()
    evaluator.process([record], [output_of(record, [(0, 0.8, *OBJECT[1:])])])
    assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100)


def test_no_detections_give_nan_and_a_warning(messages):
    record = image_of([OBJECT])
    register([record], ["one", "two"])
    result = evaluate([record], [[]])
    assert list(result) == [*METRICS, "AP-one", "AP-two"]
    assert all(math.isnan(v) for v in result.values())
    assert messages() == [f"{NAME}: the model made no detections."]


# Two libraries


def test_both_libraries_give_the_same_numbers():
    pytest.importorskip("faster_coco_eval")
    generator = np.random.default_rng(0)
    records = shapes_records("val")[:30]
    records[3]["annotations"][0]["iscrowd"] = 1
    register(records)
    detections = [jittered(r, generator) for r in records]
    fast = evaluate(records, detections, backend="faster-coco-eval")
    slow = evaluate(records, detections, backend="pycocotools")
    assert fast == pytest.approx(slow, rel=1e-9, nan_ok=True)
    assert evaluate(records, detections) == pytest.approx(fast, rel=1e-12, nan_ok=True)
    assert 5 < slow["AP"] < slow["AP50"] < 95  # a case that could differ
    assert not math.isnan(slow["APs"])
