import math

import pytest
import torch

from dsrcnn.structures import apply_deltas, box_cxcywh_to_xyxy, box_xyxy_to_cxcywh
from dsrcnn.structures.boxes import MAX_LOG_SCALE


def test_centre_and_size_become_corners():
    box = torch.tensor([0.5, 0.5, 1.0, 1.0])
    assert box_cxcywh_to_xyxy(box).tolist() == [0.0, 0.0, 1.0, 1.0]


def test_corners_become_centre_and_size():
    corners = torch.tensor([[10.0, 20, 40, 60]])
    assert box_xyxy_to_cxcywh(corners).tolist() == [[25, 40, 30, 40]]
    assert torch.equal(box_cxcywh_to_xyxy(box_xyxy_to_cxcywh(corners)), corners)


def test_deltas_give_the_worked_example():
    # width 40, height 80, centre (30, 60): centre + (0.2 * 40, -0.1 * 80), size * exp(0.1, 0.3)
    box, deltas = torch.tensor([10.0, 20, 50, 100]), torch.tensor([0.4, -0.2, 0.1, 0.3])
    half_width, half_height = 20 * math.exp(0.1), 40 * math.exp(0.3)
    expected = [38 - half_width, 52 - half_height, 38 + half_width, 52 + half_height]
    assert apply_deltas(deltas, box).tolist() == pytest.approx(expected, rel=1e-6)


def test_published_deltas():
    """As shares of an image, (0.5, 0.5, 0.2, 0.4) becomes (0.54, 0.46, 0.269972, 0.361935)."""
    box = box_cxcywh_to_xyxy(torch.tensor([50.0, 50, 20, 40]))
    found = apply_deltas(torch.tensor([0.4, -0.2, 0.3, -0.1]), box)
    expected = [54, 46, 26.9972, 36.1935]
    assert box_xyxy_to_cxcywh(found).tolist() == pytest.approx(expected, abs=1e-3)


def test_zero_deltas_change_nothing():
    boxes = torch.tensor([[10.0, 20, 50, 100], [0, 0, 1, 1]])
    assert torch.equal(apply_deltas(torch.zeros(2, 4), boxes), boxes)


def test_growth_of_one_stage_is_limited():
    assert pytest.approx(8.740336742730447) == MAX_LOG_SCALE
    box = torch.tensor([0.0, 0, 10, 10])
    limited = apply_deltas(torch.tensor([0, 0, MAX_LOG_SCALE, 0]), box)
    assert torch.equal(apply_deltas(torch.tensor([0.0, 0, 100, 0]), box), limited)


def test_half_precision_deltas_give_float32_boxes():
    box = torch.tensor([1000.25, 0, 1010.25, 10])
    moved = apply_deltas(torch.zeros(4, dtype=torch.bfloat16), box)
    assert moved.dtype == torch.float32
    assert torch.equal(moved, box)
