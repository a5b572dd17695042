import math

import pytest
import torch
from torchvision import ops

from dsrcnn.structures import OVERLAPS, pairwise_overlaps

TORCHVISION = {
    "iou": ops.box_iou,
    "giou": ops.generalized_box_iou,
    "diou": ops.distance_box_iou,
    "ciou": ops.complete_box_iou,
}


@pytest.mark.parametrize(
    ("other", "iou", "giou", "diou"),
    [
        ([5.0, 0, 15, 10], 50 / 150, 50 / 150, 50 / 150 - 25 / 325),  # hull 150 = union
        ([20.0, 0, 30, 10], 0.0, -100 / 300, -400 / 1000),
        ([0.0, 0, 10, 10], 1.0, 1.0, 1.0),
        ([2.0, 2, 4, 4], 0.04, 0.04, 0.04 - 8 / 200),
    ],
)
def test_overlaps_of_known_pairs(other, iou, giou, diou):
    boxes = torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([other])
    for kind, expected in (("iou", iou), ("giou", giou), ("diou", diou), ("ciou", diou)):
        found = pairwise_overlaps(*boxes, kind)  # all of them are square: ciou is diou
        assert [x.item() for x in found] == pytest.approx([iou, expected])


def test_another_aspect_ratio_costs_by_ciou():
    # Same centre and IoU 1/4: the angles are pi / 4 and atan(1 / 4).
    square, upright = torch.tensor([[0.0, 0, 4, 4]]), torch.tensor([[1.5, 0, 2.5, 4]])
    _, found = pairwise_overlaps(square, upright, "ciou")
    difference = 4 / math.pi**2 * (math.pi / 4 - math.atan(1 / 4)) ** 2
    assert found.item() == pytest.approx(0.25 - difference**2 / (0.75 + difference))


@pytest.mark.parametrize("kind", OVERLAPS)
def test_overlaps_agree_with_torchvision_over_leading_axes(kind):
    corner, size = torch.rand(2, 3, 9, 2) * 50, torch.rand(2, 3, 9, 2) * 30 + 1
    boxes = torch.cat([corner, corner + size], dim=-1)
    left, right = boxes[:, :, :5], boxes[:, :, 5:]
    iou, overlap = pairwise_overlaps(left, right, kind)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(iou[i, j], ops.box_iou(left[i, j], right[i, j]))
            expected = TORCHVISION[kind](left[i, j], right[i, j])
            torch.testing.assert_close(overlap[i, j], expected)


@pytest.mark.parametrize("kind", OVERLAPS)
@pytest.mark.parametrize(
    "box",
    [[5.0, 5, 5, 5], [9.0, 9, 3, 3], [0.0, 0, 0, 10], [1e15, 1e15, 1e15, 1e15], [0.0, 0, 10, 10]],
)
def test_degenerate_and_equal_boxes_give_finite_overlaps_and_gradients(box, kind):
    boxes = torch.tensor([box, box], requires_grad=True)
    others = torch.tensor([[0.0, 0, 10, 10], box])
    found = pairwise_overlaps(boxes, others, kind)
    found[1].sum().backward()
    assert all(torch.isfinite(x).all() for x in (*found, boxes.grad))


@pytest.mark.parametrize("kind", ["iou", "giou", "diou"])
def test_gradients_are_those_of_small_differences(kind):
    boxes = torch.tensor([[0.0, 0, 10, 8], [3, 1, 7, 13], [30, 1, 33, 9]], dtype=torch.float64)
    others = torch.tensor([[2.0, 1, 9, 11], [20, 3, 31, 8]], dtype=torch.float64)
    inputs = (boxes.requires_grad_(), others.requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: pairwise_overlaps(a, b, kind)[1], inputs)


def test_the_gradient_of_ciou_is_torchvisions():
    corner, size = torch.rand(6, 2) * 20, torch.rand(6, 2) * 30 + 5
    boxes, others = torch.cat([corner, corner + size], dim=-1), torch.rand(6, 4)
    others = torch.cat([others[:, :2] * 20, others[:, :2] * 20 + 5 + 30 * others[:, 2:]], dim=-1)
    ours, theirs = (boxes.clone().requires_grad_() for _ in range(2))
    _, found = pairwise_overlaps(ours.unsqueeze(-2), others.unsqueeze(-2), "ciou")
    (1 - found).sum().backward()
    ops.complete_box_iou_loss(theirs, others, reduction="sum").backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
