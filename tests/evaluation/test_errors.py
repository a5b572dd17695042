"""Errors of detections by kind, and their cost in AP, by hand."""

import numpy as np
import pytest
from coco_cases import NAME, evaluate, jittered, register
from detectron2.structures import BoxMode

from dsrcnn.data.datasets.shapes import CLASSES, shapes_records
from dsrcnn.evaluation import CocoEvaluator
from dsrcnn.evaluation.coco import coco_ground_truth
from dsrcnn.evaluation.errors import (
    KINDS,
    ImageDetections,
    analyze_errors,
    average_precision,
    collect_images,
    crowd_overlap,
    iou_matrix,
    judge,
)


def analyze(images, classes, **options):
    return analyze_errors(images, [judge(image) for image in images], classes, **options)


BOX, OTHER = [0, 0, 10, 10], [50, 50, 60, 60]
NEAR = [4, 0, 14, 10]  # IoU 6 / 14 with BOX
FAR = [80, 80, 90, 90]


def image(objects, detections, crowds=()):
    """Objects as (label, box), detections as (label, box), best first."""
    labels, boxes = zip(*objects, strict=True) if objects else ((), ())
    found, places = zip(*detections, strict=True) if detections else ((), ())
    flags = np.zeros(len(labels), bool)
    flags[list(crowds)] = True
    return ImageDetections(
        *(np.array(boxes, float).reshape(-1, 4), np.array(labels, int), flags),
        *(np.array(places, float).reshape(-1, 4), np.array(found, int)),
        np.linspace(0.9, 0.5, len(found)),
    )


def test_iou_of_pairs():
    matrix = iou_matrix(np.array([BOX, NEAR], float), np.array([BOX, FAR], float))
    assert matrix.tolist() == [[1.0, 0.0], [pytest.approx(6 / 14), 0.0]]


@pytest.mark.parametrize(("objects", "detections", "kinds", "missed"), [
    ([(0, BOX)], [(0, BOX)], [""], [False]),
    # As in TIDE, an object that an error of class or place explains is not missed, too.
    ([(0, BOX)], [(1, BOX)], ["class"], [False]),
    ([(0, BOX)], [(0, NEAR)], ["place"], [False]),
    ([(0, BOX)], [(1, NEAR)], ["class and place"], [True]),
    ([(0, BOX)], [(0, FAR)], ["background"], [True]),
    ([(0, BOX)], [(0, BOX), (0, [0, 0, 10, 9])], ["", "duplicate"], [False]),
    ([], [(0, BOX)], ["background"], []),
    ([(0, BOX), (1, OTHER)], [], [], [True, True]),
    # Of several kinds that fit, the first in the order of TIDE's code: place, class, duplicate.
    ([(0, BOX), (1, [6, 0, 16, 10])], [(0, NEAR)], ["place"], [False, True]),
    ([(0, BOX), (1, [0, 0, 10, 9])], [(0, BOX), (0, BOX)], ["", "class"], [False, False]),
    # The second best takes the object that the best one left.
    ([(0, BOX), (0, [0, 0, 10, 8])], [(0, BOX), (0, BOX)], ["", ""], [False, False]),
])  # fmt: skip
def test_every_error_has_the_kind_that_explains_it_best(objects, detections, kinds, missed):
    result = judge(image(objects, detections))
    assert [KINDS[k] if k >= 0 else "" for k in result.kind] == kinds
    assert result.missed.tolist() == missed


def test_detections_on_crowds_are_ignored_and_crowds_are_not_missed():
    result = judge(image([(0, BOX)], [(0, BOX), (0, BOX), (1, BOX)], crowds=[0]))
    assert result.ignored.tolist() == [True, True, False]
    assert KINDS[result.kind[2]] == "background"
    assert not result.missed.any()


@pytest.mark.parametrize(("correct", "objects", "expected"), [
    ([True], 1, 1.0), ([False, True], 1, 0.5), ([True, False], 2, 51 / 101), ([], 3, 0.0),
    ([True, False, True], 2, (51 + 50 * 2 / 3) / 101),
])  # fmt: skip
def test_average_precision_has_101_recall_points(correct, objects, expected):
    scores = np.linspace(0.9, 0.1, len(correct))
    ap = average_precision(scores, np.array(correct, bool), objects)
    assert ap == pytest.approx(expected)
    assert np.isnan(average_precision(scores, np.array(correct, bool), 0))


@pytest.mark.parametrize(("detections", "ap50", "costs"), [
    # Wrong class: with the right one AP is 100. Class 1 has no objects, so it does not count.
    ([(1, BOX)], 0, {"class": 100, "missed": 0}),
    ([(0, NEAR)], 0, {"place": 100}),
    # The duplicate comes after full recall and costs nothing.
    ([(0, BOX), (0, BOX)], 100, dict.fromkeys(KINDS, 0)),
    ([(0, FAR), (0, BOX)], 50, {"background": 50, "place": 0, "missed": 0}),
])  # fmt: skip
def test_the_cost_of_a_kind_is_what_ap_gains_without_it(detections, ap50, costs):
    report = analyze([image([(0, BOX)], detections)], classes=2)
    assert report.ap50 == pytest.approx(ap50)
    assert {k: report.costs[k] for k in costs} == pytest.approx(costs)


def test_an_object_of_the_wrong_class_is_one_error_and_costs_once():
    scene = image([(0, BOX), (0, OTHER)], [(0, BOX), (1, OTHER)])
    report = analyze([scene], classes=2)
    assert report.counts == {**dict.fromkeys(KINDS, 0), "class": 1}
    assert report.costs["class"] == pytest.approx(100 * 50 / 101)
    assert report.costs["missed"] == 0


def test_missed_objects_cost_the_recall_they_take():
    report = analyze([image([(0, BOX), (0, OTHER)], [(0, BOX)])], classes=1)
    assert report.ap50 == pytest.approx(100 * 51 / 101)
    assert report.costs["missed"] == pytest.approx(100 * 50 / 101)


def test_errors_are_counted_from_the_threshold_on():
    scene = image([(0, BOX), (0, OTHER)], [(0, BOX), (0, BOX), (0, FAR)])  # scores 0.9, 0.7, 0.5
    counts = [analyze([scene], 1, threshold=t).counts for t in (0.3, 0.6, 0.95)]
    assert [c["duplicate"] for c in counts] == [1, 1, 0]
    assert [c["background"] for c in counts] == [1, 0, 0]
    assert [c["missed"] for c in counts] == [1, 1, 2]


def results_of(records, found):
    """COCO results of detections (label, score, x1, y1, x2, y2), a list per record."""
    return [
        {
            "image_id": record["image_id"], "category_id": label, "score": score,
            "bbox": [x1, y1, x2 - x1, y2 - y1],
        }
        for record, of_image in zip(records, found, strict=True)
        for label, score, x1, y1, x2, y2 in of_image
    ]  # fmt: skip


def test_small_detections_in_a_crowd_are_ignored_as_in_coco():
    # Eight boxes of 10 x 10 in a crowd of 100 x 100 have an IoU of 0.01 with it.
    inside = [(0, [10 * i, 0, 10 * i + 10, 10]) for i in range(8)]
    hit = (0, [150, 150, 190, 190])
    report = analyze([image([(0, [0, 0, 100, 100]), hit], [*inside, hit], crowds=[0])], classes=1)
    assert report.ap50 == pytest.approx(100)
    assert report.costs == pytest.approx(dict.fromkeys(KINDS, 0))
    assert report.counts == dict.fromkeys(KINDS, 0)


@pytest.mark.parametrize(("right", "is_ignored"), [(20, True), (21, False)])
def test_half_of_the_area_of_a_detection_must_be_in_the_crowd(right, is_ignored):
    result = judge(image([(0, BOX)], [(0, [0, 0, right, 10])], crowds=[0]))
    assert result.ignored.tolist() == [is_ignored]


def test_boxes_without_area_are_in_no_crowd():
    shares = crowd_overlap(np.array([[5, 5, 5, 8], BOX, FAR], float), np.array([BOX], float))
    assert shares.tolist() == [[0.0], [1.0], [0.0]]
    assert crowd_overlap(np.zeros((2, 4)), np.zeros((0, 4))).shape == (2, 0)


def test_the_best_detections_of_each_class_count():
    truth = {
        "images": [{"id": 7}],
        "categories": [{"id": 1}, {"id": 2}],
        "annotations": [],
    }
    found = [(1, 0.5), (2, 0.9), (1, 0.7), (1, 0.6), (2, 0.4)]
    results = [
        {"image_id": 7, "category_id": c, "bbox": [0, 0, 5, 5], "score": s} for c, s in found
    ]
    (scene,) = collect_images(truth, results, limit=2)
    assert scene.scores.tolist() == [0.9, 0.7, 0.6, 0.4]
    assert scene.labels.tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize("limit", [100, 2])
@pytest.mark.parametrize("crowds", [False, True])
def test_ap50_is_that_of_coco(crowds, limit):
    records = shapes_records("val")[:25]
    for record in records[::2] if crowds else ():
        record["annotations"].append({
            "bbox": [0, 0, record["width"] / 2, record["height"]], "iscrowd": 1,
            "category_id": record["image_id"] % 5, "bbox_mode": BoxMode.XYXY_ABS,
        })  # fmt: skip
    register(records)
    generator = np.random.default_rng(0)
    found = [jittered(record, generator) for record in records]
    evaluator = CocoEvaluator(NAME, max_detections=limit)
    expected = evaluate(records, found, evaluator=evaluator)["AP50"]
    images = collect_images(coco_ground_truth(NAME), results_of(records, found), limit)
    assert analyze(images, len(CLASSES)).ap50 == pytest.approx(expected, abs=1e-3)
    assert 5 < expected < 95
