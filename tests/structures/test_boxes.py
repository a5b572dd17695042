import math

import pytest
import torch

from dsrcnn.structures import apply_deltas, box_cxcywh_to_xyxy, pairwise_iou_giou
from dsrcnn.structures.boxes import MAX_LOG_SCALE


def test_centre_and_size_become_corners():
    box = torch.tensor([0.5, 0.5, 1.0, 1.0])
    assert box_cxcywh_to_xyxy(box).tolist() == [0.0, 0.0, 1.0, 1.0]


def test_deltas_give_the_worked_example():
    # width 40, height 80, centre (30, 60): centre + (0.2 * 40, -0.1 * 80), size * exp(0.1, 0.3)
    box, deltas = torch.tensor([10.0, 20, 50, 100]), torch.tensor([0.4, -0.2, 0.1, 0.3])
    half_width, half_height = 20 * math.exp(0.1), 40 * math.exp(0.3)
    expected = [38 - half_width, 52 - half_height, 38 + half_width, 52 + half_height]
    assert apply_deltas(deltas, box).tolist() == pytest.approx(expected, rel=1e-6)


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


@pytest.mark.parametrize(
    ("other", "iou", "giou"),
    [
        ([5.0, 0, 15, 10], 50 / 150, 50 / 150),  # hull 150 = union
        ([20.0, 0, 30, 10], 0.0, -100 / 300),
        ([0.0, 0, 10, 10], 1.0, 1.0),
        ([2.0, 2, 4, 4], 0.04, 0.04),
    ],
)
def test_overlaps_of_known_pairs(other, iou, giou):
    found = pairwise_iou_giou(torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([other]))
    assert [x.item() for x in found] == pytest.approx([iou, giou])


def test_overlaps_agree_with_torchvision_over_leading_axes():
    from torchvision.ops import box_iou, generalized_box_iou

    corner, size = torch.rand(2, 3, 9, 2) * 50, torch.rand(2, 3, 9, 2) * 30 + 1
    boxes = torch.cat([corner, corner + size], dim=-1)
    left, right = boxes[:, :, :5], boxes[:, :, 5:]
    iou, giou = pairwise_iou_giou(left, right)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(iou[i, j], box_iou(left[i, j], right[i, j]))
            torch.testing.assert_close(giou[i, j], generalized_box_iou(left[i, j], right[i, j]))


@pytest.mark.parametrize(
    "box", [[5.0, 5, 5, 5], [9.0, 9, 3, 3], [0.0, 0, 0, 10], [1e15, 1e15, 1e15, 1e15]]
)
def test_degenerate_boxes_give_finite_overlaps(box):
    found = pairwise_iou_giou(torch.tensor([box]), torch.tensor([[0.0, 0, 10, 10], box]))
    assert all(torch.isfinite(x).all() for x in found)


def test_identical_boxes_have_a_finite_gradient():
    box = torch.tensor([[0.0, 0, 10, 10]], requires_grad=True)
    pairwise_iou_giou(box, box.detach().clone())[1].sum().backward()
    assert torch.isfinite(box.grad).all()
