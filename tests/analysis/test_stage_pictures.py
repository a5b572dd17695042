"""Stages compared on images: predictions, matched and lost objects, drawn routes."""

import numpy as np
import pytest
import torch
from conftest import batch, tiny_cfg
from detectron2.modeling import build_model

from dsrcnn.analysis.recollection import best_stage, match_objects, route_dots, route_line
from dsrcnn.modeling.decoder.sqr import recollection_windows, routes_of

DROPOUT = ["MODEL.SparseRCNN.DROPOUT", 0.5]
SQR = ["MODEL.SparseRCNN.SQR.ENABLED", True, *DROPOUT]


@pytest.mark.parametrize("opts", [DROPOUT, SQR, ["MODEL.META_ARCHITECTURE", "AdaMixer"]])
@torch.no_grad()
def test_predictions_of_all_stages_end_with_those_of_inference(opts):
    model = build_model(tiny_cfg("MODEL.SparseRCNN.NUM_HEADS", 3, *opts)).eval()
    inputs = batch([(64, 96)], [2])
    last, _ = model.raw_predictions(inputs)
    predictions, _ = model.raw_predictions(inputs, all_stages=True)
    assert predictions.stage.tolist() == [0, 1, 2]
    assert torch.equal(predictions.logits[2:], last.logits)
    assert torch.equal(predictions.boxes[2:], last.boxes)


OBJECTS = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10], [21, 0, 31, 10]])
CLASSES = torch.tensor([0, 1, 1])


@pytest.mark.parametrize(("boxes", "labels", "expected"), [
    ([[0, 0, 10, 8]], [0], [True, False, False]),
    ([[0, 0, 10, 8]], [1], [False, False, False]),  # another class
    ([[0, 0, 10, 4.9]], [0], [False, False, False]),  # IoU 0.49
    ([[21, 0, 31, 10]], [1], [False, False, True]),  # the nearer one
    ([[21, 0, 31, 10], [21, 0, 31, 10]], [1, 1], [False, True, True]),  # then the free one
    ([], [], [False, False, False]),
])  # fmt: skip
def test_objects_are_matched_with_detections_of_their_class(boxes, labels, expected):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    assert match_objects(boxes, torch.tensor(labels), OBJECTS, CLASSES).tolist() == expected
    assert match_objects(boxes, torch.tensor(labels), OBJECTS[:0], CLASSES[:0]).tolist() == []


@pytest.mark.parametrize(("lost", "expected"), [
    ([[1, 1, 0], [0, 1, 0], [1, 0, 1]], 2), ([[1, 1, 1], [1, 0, 1]], 0), ([[0], [0]], 1),
])  # fmt: skip
def test_lost_objects_are_drawn_for_the_latest_stage_that_detects_most_of_them(lost, expected):
    assert best_stage(torch.tensor(lost).bool()) == expected


@pytest.mark.parametrize(
    "kind", [*({"num_plain_stages": i} for i in range(1, 7)), {"dense": True}], ids=str
)
def test_a_line_touches_only_the_dots_at_its_ends(kind):
    routes = routes_of(recollection_windows(6, **kind))
    dots = route_dots(routes)
    assert len(dots) == len(set(dots.values())) == 1 + sum(len(r) for r in routes)
    for route, end in dots.items():
        if not route:
            continue
        start = dots[route[:-1]]
        line = route_line(dots, start, end)
        assert (tuple(line[0]), tuple(line[-1])) == (start, end)
        passed = np.array([d for d in dots.values() if d not in (start, end)])
        assert np.linalg.norm(line[:, None] - passed, axis=2).min() > 0.1, route


def test_the_plain_cascade_is_the_straight_line_at_the_bottom():
    dots = route_dots(routes_of(recollection_windows(4)))
    assert [dots[tuple(range(1, n + 1))] for n in range(5)] == [(n, 0) for n in range(5)]
    assert not route_line(dots, dots[(1,)], dots[(1, 2)])[:, 1].any()
