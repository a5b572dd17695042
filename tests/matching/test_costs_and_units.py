"""What matchers work on: costs of all pairs, and units of all ground truths."""

import math

import pytest
import torch
from scenes import scene

from dsrcnn.modeling.matching import (
    CostSettings,
    UnitRule,
    assign_units,
    pairwise_costs,
    unit_offsets,
)
from dsrcnn.modeling.matching.costs import class_cost
from dsrcnn.structures import Predictions, Targets, TermWeights

# The worked example: sums of the largest 8 and 4 are 4.25 and 3.15.
IOU = torch.tensor([0.2, 0.9, 0.5, 0.85, 0.1, 0.8, 0.3, 0.6])
SIX_STAGES = torch.arange(6)


@pytest.mark.parametrize(
    ("probability", "expected"), [(0.01, 1.128381), (0.5, -0.086643), (0.9, -1.398557)]
)
def test_focal_class_cost_agrees_with_hand_calculation(probability, expected):
    logits = torch.tensor([[[[math.log(probability / (1 - probability)), 5.0]]]])
    cost = class_cost(logits, torch.tensor([[0]]), focal=True)
    assert cost.item() == pytest.approx(expected, abs=1e-5)


def test_softmax_class_cost_is_the_negative_probability():
    cost = class_cost(torch.tensor([[[[0.0, math.log(3.0)]]]]), torch.tensor([[1]]), focal=False)
    assert cost.item() == pytest.approx(-0.75)


def test_total_cost_is_the_weighted_sum_of_its_terms():
    # One proposal, one ground truth, shifted by half its width: IoU = GIoU = 1/3; L1 over 20 = 0.5
    boxes, gt_boxes = torch.tensor([0.0, 0, 10, 10]), torch.tensor([5.0, 0, 15, 10])
    predictions = Predictions(torch.zeros(1, 1, 1, 3), boxes.view(1, 1, 1, 4), torch.tensor([0]))
    mask, sizes = torch.ones(1, 1, dtype=torch.bool), torch.full((1, 4), 20.0)
    targets = Targets(gt_boxes.view(1, 1, 4), torch.tensor([[2]]), mask, sizes)
    cost, iou = pairwise_costs(predictions, targets, CostSettings(TermWeights(2.0, 5.0, 2.0)))
    assert iou.item() == pytest.approx(1 / 3)
    assert cost.item() == pytest.approx(2 * -0.0866434 + 5 * 0.5 - 2 / 3, abs=1e-5)


@pytest.mark.parametrize("target", ["label", "iou"])
def test_class_cost_is_the_loss_of_the_ground_truth_minus_the_loss_of_background(target):
    """Transport: focal loss of the one-hot class minus focal loss of no class, all classes."""
    predictions, targets = scene([3], sets=1)
    settings = CostSettings(TermWeights(2.0, 0.0, 0.0), class_target=target)
    cost, iou = pairwise_costs(predictions, targets, settings)
    p = predictions.logits[0, 0].double().sigmoid()  # (P, C)

    def focal(one_hot, q):
        positive = 0.25 * (q - p).abs() ** 2 * -(q * p.log() + (1 - q) * (1 - p).log()) * one_hot
        return (positive + 0.75 * p**2 * -(1 - p).log() * (1 - one_hot)).sum(dim=-1)

    for row, label in enumerate(targets.labels[0]):
        one_hot = torch.nn.functional.one_hot(label, 4)
        quality = iou[0, 0, row, :, None] if target == "iou" else 1
        expected = 2 * (focal(one_hot, quality) - focal(torch.zeros(4), 1))
        torch.testing.assert_close(cost[0, 0, row].double(), expected, atol=1e-5, rtol=1e-5)


def flip(boxes):
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack([200 - x2, y1, 200 - x1, y2], dim=-1)


@pytest.mark.parametrize(("transform", "scale"), [(lambda x: x * 3, 3), (flip, 1)])
def test_scaling_or_flipping_an_image_keeps_its_costs(transform, scale):
    predictions, targets = scene([3, 5])
    costs = pairwise_costs(
        predictions._replace(boxes=transform(predictions.boxes)),
        targets._replace(boxes=transform(targets.boxes), sizes=targets.sizes * scale),
        CostSettings(),
    )
    mask = targets.mask.unsqueeze(-1).expand(2, -1, -1, 9)
    for a, b in zip(costs, pairwise_costs(predictions, targets, CostSettings()), strict=True):
        torch.testing.assert_close(a[mask], b[mask], atol=1e-4, rtol=1e-5)


def units_of(iou, *, max_positives=1000, mask=None, **kwargs):
    mask = torch.ones(iou.shape[:-1], dtype=torch.bool) if mask is None else mask
    return assign_units(iou, mask, max_positives=max_positives, **kwargs)


@pytest.mark.parametrize(("settings", "expected"), [
    ({"top_q": 8}, [1, 2, 2, 3, 3, 4]), ({"top_q": 4}, [1, 1, 1, 2, 2, 3]),
    ({"top_q": 99}, [1, 2, 2, 3, 3, 4]), ({"static_units": 3}, [1, 1, 1, 2, 2, 3]),
])  # fmt: skip
def test_dynamic_and_static_units_grow_with_the_stage(settings, expected):
    offset = unit_offsets(SIX_STAGES, 6).unsqueeze(-1)
    assert offset.flatten().tolist() == [2.5, 2.0, 1.5, 1.0, 0.5, 0.0]
    units = units_of(IOU.expand(6, 1, 8), offset=offset, **settings)
    assert units.flatten().tolist() == expected


def test_units_are_rounded_down_to_at_least_one():
    iou = torch.tensor([[0.9, 0.9, 0.9, 0.9], [0.1, 0.1, 0.1, 0.1]])  # sums 3.6 and 0.4
    assert units_of(iou).tolist() == [3, 1]
    assert units_of(torch.zeros(2, 5)).tolist() == [1, 1]
    assert units_of(torch.zeros(0, 5)).tolist() == []


def test_cap_scales_all_ground_truths_by_one_factor_after_the_offset():
    iou = torch.tensor([[1.0] * 8 + [0] * 4, [1.0] * 4 + [0] * 8])  # 8 and 4 units on 12 proposals
    assert units_of(iou, max_positives=6).tolist() == [4, 2]
    assert units_of(iou, offset=2.0).tolist() == [6, 2]
    assert units_of(iou, offset=2.0, max_positives=6).tolist() == [4, 1]  # (6, 2) * 6 / 8


@pytest.mark.parametrize(("fit", "cap", "expected"), [
    ([0.9] + [0.01] * 7, 8, [1] * 8),
    # Scaled by 8 / 9: 7.1 and 0.1 five times. At least 1 each is 12, of which 3 may be extra.
    ([1.0] + [0.025] * 5, 8, [3, 1, 1, 1, 1, 1]),
    # The first unit of each overrides the cap, as long as there are proposals: ten here.
    ([0.3, 0.9, 0.1, 0.5], 2, [1, 1, 1, 1]), ([1.0] * 10, 2, [1] * 10),
    # Then the best fitting get a unit, ties go to the first.
    ([0.3, *[0.9] * 8, 0.1, 0.5], 2, [1] * 9 + [0, 1]), ([1.0] * 12, 2, [1] * 10 + [0, 0]),
    # Float rounding loses no unit of eight each.
    ([1.0] * 10, 40, [4] * 10), ([1.0] * 20, 40, [2] * 20), ([1.0] * 3, 9, [3] * 3),
])  # fmt: skip
def test_units_of_crowds_shrink_to_the_cap(fit, cap, expected):
    iou = torch.tensor(fit).unsqueeze(-1).expand(-1, max(10, cap))
    assert units_of(iou, max_positives=cap).tolist() == expected


def test_padding_gets_no_units_and_changes_nothing():
    iou, mask = torch.rand(3, 12), torch.tensor([True, False, True])
    units = units_of(iou, mask=mask, max_positives=5)
    assert units[1] == 0
    assert torch.equal(units[mask], units_of(iou[mask], max_positives=5))


@pytest.mark.parametrize("count", [0, 1, 7, 40, 120])
def test_a_fifth_stays_background_unless_objects_need_it_and_units_never_shrink_with_the_stage(
    count,
):
    iou = (torch.rand(2, count, 100) ** 0.2).expand(6, 2, count, 100)
    units = UnitRule(num_stages=6)(iou, torch.ones(2, count, dtype=torch.bool), SIX_STAGES)
    assert units.sum(dim=-1).max() <= max(80, min(count, 100))
    if count <= 7:
        assert (units.diff(dim=0) >= 0).all()
        assert count == 0 or units[-1].sum() > units[0].sum()
    if 0 < count <= 100:
        assert units.min() >= 1


@pytest.mark.parametrize(("fraction", "proposals", "expected"), [
    (0.8, 300, 240), (0.8, 100, 80), (0.29, 100, 29), (0.8, 1, 1), (1.0, 7, 7),
])  # fmt: skip
def test_cap_is_a_fraction_of_the_proposals_and_at_least_one(fraction, proposals, expected):
    assert UnitRule(6, max_positive_fraction=fraction).max_positives(proposals) == expected
