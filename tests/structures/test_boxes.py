"""Box formats, delta coding and overlaps."""

import math

import pytest
import torch
from torchvision import ops

from dsrcnn.structures import (
    OVERLAPS,
    apply_deltas,
    box_cxcywh_to_xyxy,
    box_xyxy_to_cxcywh,
    boxes_to_xyzr,
    pairwise_overlaps,
    xyzr_to_boxes,
)
from dsrcnn.structures.boxes import MAX_LOG_SCALE

TORCHVISION = {
    "iou": ops.box_iou,
    "giou": ops.generalized_box_iou,
    "diou": ops.distance_box_iou,
    "ciou": ops.complete_box_iou,
}
BOXES = torch.tensor([[10.0, 20, 74, 36], [0, 0, 8, 8], [-5, 3, 1000, 700]], dtype=torch.float64)


def random_boxes(*shape):
    corner = torch.rand(*shape, 2) * 50
    return torch.cat([corner, corner + torch.rand(*shape, 2) * 30 + 1], dim=-1)


def test_center_and_size_convert_to_corners_and_back():
    unit = torch.tensor([0.5, 0.5, 1.0, 1.0])
    assert box_cxcywh_to_xyxy(unit).tolist() == [0.0, 0.0, 1.0, 1.0]
    corners = torch.tensor([[10.0, 20, 40, 60]])
    assert box_xyxy_to_cxcywh(corners).tolist() == [[25, 40, 30, 40]]
    assert torch.equal(box_cxcywh_to_xyxy(box_xyxy_to_cxcywh(corners)), corners)


def test_deltas_agree_with_hand_calculation_and_published_numbers():
    # width 40, height 80, center (30, 60): center + (0.2 * 40, -0.1 * 80), size * exp(0.1, 0.3)
    box = torch.tensor([30.0, 60, 40, 80])
    refined = apply_deltas(torch.tensor([0.4, -0.2, 0.1, 0.3]), box_cxcywh_to_xyxy(box))
    expected = [38, 52, 40 * math.exp(0.1), 80 * math.exp(0.3)]
    assert box_xyxy_to_cxcywh(refined).tolist() == pytest.approx(expected, rel=1e-6)
    box = torch.tensor([50.0, 50, 20, 40])
    refined = apply_deltas(torch.tensor([0.4, -0.2, 0.3, -0.1]), box_cxcywh_to_xyxy(box))
    expected = [54, 46, 26.9972, 36.1935]
    assert box_xyxy_to_cxcywh(refined).tolist() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(("weights", "deltas"), [
    ((10, 10, 5, 5), [2.0, -1.0, 0.5, 1.5]), ((10, 5, 5, 2), [2.0, -0.5, 0.5, 0.6]),
])  # fmt: skip
def test_deltas_are_divided_by_the_weights(weights, deltas):
    box = box_cxcywh_to_xyxy(torch.tensor([30.0, 60, 40, 80]))
    refined = apply_deltas(torch.tensor(deltas), box, weights)
    expected = [38, 52, 40 * math.exp(0.1), 80 * math.exp(0.3)]
    assert box_xyxy_to_cxcywh(refined).tolist() == pytest.approx(expected, rel=1e-6)


def test_sizes_are_limited_after_the_division():
    box = torch.tensor([0.0, 0, 10, 10])
    limited = apply_deltas(torch.tensor([0, 0, MAX_LOG_SCALE, MAX_LOG_SCALE]), box)
    weights = (10.0, 10.0, 5.0, 5.0)
    assert torch.equal(apply_deltas(torch.tensor([0.0, 0, 500, 500]), box, weights), limited)


def test_zero_deltas_keep_boxes_also_in_half_precision():
    boxes = torch.tensor([[10.0, 20, 50, 100], [0, 0, 1, 1], [1000.25, 0, 1010.25, 10]])
    for dtype in (torch.float32, torch.bfloat16):
        refined = apply_deltas(torch.zeros(3, 4, dtype=dtype), boxes)
        assert refined.dtype == torch.float32
        assert torch.equal(refined, boxes)


def test_growth_per_stage_is_limited():
    assert pytest.approx(8.740336742730447) == MAX_LOG_SCALE
    box = torch.tensor([0.0, 0, 10, 10])
    limited = apply_deltas(torch.tensor([0, 0, MAX_LOG_SCALE, MAX_LOG_SCALE]), box)
    assert torch.equal(apply_deltas(torch.tensor([0.0, 0, 100, 100]), box), limited)


@pytest.mark.parametrize(("other", "iou", "giou", "diou"), [
    ([5.0, 0, 15, 10], 50 / 150, 50 / 150, 50 / 150 - 25 / 325),  # hull 150 = union
    ([20.0, 0, 30, 10], 0.0, -100 / 300, -400 / 1000), ([0.0, 0, 10, 10], 1.0, 1.0, 1.0),
    ([2.0, 2, 4, 4], 0.04, 0.04, 0.04 - 8 / 200),
])  # fmt: skip
def test_overlaps_of_squares_agree_with_hand_calculation(other, iou, giou, diou):
    boxes = torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([other])
    for kind, expected in (("iou", iou), ("giou", giou), ("diou", diou), ("ciou", diou)):
        overlaps = pairwise_overlaps(*boxes, kind)  # equal aspect ratios: ciou is diou
        assert [x.item() for x in overlaps] == pytest.approx([iou, expected])


def test_ciou_penalizes_a_different_aspect_ratio():
    # Same center and IoU 1/4: the angles are pi / 4 and atan(1 / 4).
    square, upright = torch.tensor([[0.0, 0, 4, 4]]), torch.tensor([[1.5, 0, 2.5, 4]])
    _, ciou = pairwise_overlaps(square, upright, "ciou")
    difference = 4 / math.pi**2 * (math.pi / 4 - math.atan(1 / 4)) ** 2
    assert ciou.item() == pytest.approx(0.25 - difference**2 / (0.75 + difference))


@pytest.mark.parametrize("kind", OVERLAPS)
def test_overlaps_agree_with_torchvision_over_leading_axes(kind):
    left, right = random_boxes(2, 3, 5), random_boxes(2, 3, 4)
    iou, overlap = pairwise_overlaps(left, right, kind)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(iou[i, j], ops.box_iou(left[i, j], right[i, j]))
            expected = TORCHVISION[kind](left[i, j], right[i, j])
            torch.testing.assert_close(overlap[i, j], expected)


@pytest.mark.parametrize("kind", OVERLAPS)
@pytest.mark.parametrize(
    "box", [[5.0] * 4, [9.0, 9, 3, 3], [0.0, 0, 0, 10], [1e15] * 4, [0.0, 0, 10, 10]]
)
def test_degenerate_and_equal_boxes_have_finite_overlaps_and_gradients(box, kind):
    boxes = torch.tensor([box, box], requires_grad=True)
    overlaps = pairwise_overlaps(boxes, torch.tensor([[0.0, 0, 10, 10], box]), kind)
    overlaps[1].sum().backward()
    assert all(torch.isfinite(x).all() for x in (*overlaps, boxes.grad))


@pytest.mark.parametrize("kind", ["iou", "giou", "diou"])
def test_gradients_of_overlaps_agree_with_finite_differences(kind):
    boxes = torch.tensor([[0.0, 0, 10, 8], [3, 1, 7, 13], [30, 1, 33, 9]], dtype=torch.float64)
    others = torch.tensor([[2.0, 1, 9, 11], [20, 3, 31, 8]], dtype=torch.float64)
    inputs = (boxes.requires_grad_(), others.requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: pairwise_overlaps(a, b, kind)[1], inputs)


def test_gradient_of_ciou_agrees_with_torchvision():
    first, others = random_boxes(6), random_boxes(6)
    boxes, reference = (first.clone().requires_grad_() for _ in range(2))
    _, ciou = pairwise_overlaps(boxes.unsqueeze(-2), others.unsqueeze(-2), "ciou")
    (1 - ciou).sum().backward()
    ops.complete_box_iou_loss(reference, others, reduction="sum").backward()
    torch.testing.assert_close(boxes.grad, reference.grad, rtol=1e-4, atol=1e-6)


def test_xyzr_agrees_with_hand_calculation():
    # 64 x 16 pixels: scale 32 = 2^5, ratio 1/4 = 2^-2.
    assert boxes_to_xyzr(BOXES[0]).tolist() == pytest.approx([42, 28, 5, -2], abs=1e-5)
    expected = [42 / 4, 28 / 4, 3, -1]  # in units of 4 pixels, half of the ratio's logarithm
    xyzr = boxes_to_xyzr(BOXES[0], unit=4.0, ratio_scale=0.5)
    assert xyzr.tolist() == pytest.approx(expected, abs=1e-5)


def test_xyzr_agrees_with_published_numbers():
    """Two parametrizations of one box, and AdaMixer's first query of a 1333 x 800 image."""
    expected = [388.6863, 177.3726, 411.3137, 222.6274]
    asag = xyzr_to_boxes(torch.tensor([100, 50, 3, 0.5]), unit=4.0, ratio_scale=0.5)
    adamixer = xyzr_to_boxes(torch.tensor([400.0, 200, 5, 1]))
    moved = xyzr_to_boxes(torch.tensor([104, 48, 3.1, 0.3]), unit=4.0, ratio_scale=0.5)
    assert asag.tolist() == pytest.approx(expected, abs=1e-3)
    assert adamixer.tolist() == pytest.approx(expected, abs=1e-3)
    assert moved.tolist() == pytest.approx([402.0712, 170.8879, 429.9288, 213.1121], abs=1e-3)
    first = boxes_to_xyzr(torch.tensor([0.0, 0, 1333, 800]))
    assert first[2:].tolist() == pytest.approx([10.012159, -0.736605], abs=1e-5)


@pytest.mark.parametrize("options", [{}, {"unit": 4.0, "ratio_scale": 0.5}, {"unit": 16.0}])
def test_xyzr_converts_back_to_the_box(options):
    restored = xyzr_to_boxes(boxes_to_xyzr(BOXES, **options), **options)
    torch.testing.assert_close(restored, BOXES, rtol=1e-5, atol=1e-4)


def test_xyzr_of_empty_boxes_and_boxes_of_extreme_xyzr_are_finite():
    assert torch.isfinite(boxes_to_xyzr(torch.tensor([[5.0, 5, 5, 9], [9.0, 9, 3, 3]]))).all()
    assert torch.isfinite(xyzr_to_boxes(torch.tensor([0.0, 0, 500, -500]))).all()
