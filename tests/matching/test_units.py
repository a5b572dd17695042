import math

import pytest
import torch

from dsrcnn.modeling.matching import UnitRule, assign_units, unit_offsets

# The worked example: sums of the largest 8 and 4 are 4.25 and 3.15.
IOU = torch.tensor([0.2, 0.9, 0.5, 0.85, 0.1, 0.8, 0.3, 0.6])
SIX_STAGES = torch.arange(6)


def units_of(iou, *, max_positives=1000, mask=None, **kwargs):
    mask = torch.ones(iou.shape[:-1], dtype=torch.bool) if mask is None else mask
    return assign_units(iou, mask, max_positives=max_positives, **kwargs)


def test_offsets_shrink_by_half_a_unit_from_stage_to_stage():
    assert unit_offsets(SIX_STAGES, 6, 0.5).tolist() == [2.5, 2.0, 1.5, 1.0, 0.5, 0.0]
    assert (3 - unit_offsets(SIX_STAGES, 6, 0.5)).tolist() == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]


@pytest.mark.parametrize(
    ("top_q", "expected"),
    [(8, [1, 2, 2, 3, 3, 4]), (4, [1, 1, 1, 2, 2, 3]), (99, [1, 2, 2, 3, 3, 4])],
)
def test_dynamic_units_grow_with_the_stage_as_worked_out_by_hand(top_q, expected):
    iou = IOU.expand(6, 1, 8)
    offset = unit_offsets(SIX_STAGES, 6).unsqueeze(-1)
    assert units_of(iou, offset=offset, top_q=top_q).flatten().tolist() == expected


def test_static_units_grow_with_the_stage_and_never_fall_below_one():
    offset = unit_offsets(SIX_STAGES, 6).unsqueeze(-1)
    found = units_of(IOU.expand(6, 1, 8), offset=offset, static_units=3)
    assert found.flatten().tolist() == [1, 1, 1, 2, 2, 3]


@pytest.mark.parametrize(("rounding", "expected"), [("floor", [3, 1]), ("round", [4, 1])])
def test_rounding(rounding, expected):
    iou = torch.tensor([[0.9, 0.9, 0.9, 0.9], [0.1, 0.1, 0.1, 0.1]])  # sums 3.6 and 0.4
    assert units_of(iou, rounding=rounding).tolist() == expected


def test_the_cap_scales_all_by_one_factor():
    iou = torch.tensor([[1.0] * 8 + [0] * 4, [1.0] * 4 + [0] * 8])  # 8 and 4 units on 12 proposals
    assert units_of(iou, max_positives=6).tolist() == [4, 2]


def test_the_order_of_step_and_cap_matters_only_beyond_the_cap():
    iou = torch.tensor([[1.0] * 8 + [0] * 4, [1.0] * 4 + [0] * 8])
    for limit, first, last in ((1000, [6, 2], [6, 2]), (6, [4, 1], [2, 1])):
        # step, then cap: (6, 2) times 6 / 8 = (4.5, 1.5); cap, then step: (4, 2) - 2 = (2, 0)
        for order, expected in (("step_then_cap", first), ("cap_then_step", last)):
            found = units_of(iou, offset=2.0, max_positives=limit, order=order)
            assert found.tolist() == expected


def test_a_crowd_of_as_many_objects_as_the_cap_gets_one_unit_each():
    iou = torch.cat([torch.full((1, 10), 0.9), torch.full((7, 10), 0.01)])
    assert units_of(iou, max_positives=8).tolist() == [1] * 8


def test_units_beyond_the_first_shrink_when_the_least_of_one_exceeds_the_cap():
    # Scaled by 8 / 9: 7.1 and 0.1 five times. At least 1 each makes 12, of which 3 may be extra.
    iou = torch.cat([torch.ones(1, 10), torch.full((5, 10), 0.025)])
    assert units_of(iou, max_positives=8).tolist() == [3, 1, 1, 1, 1, 1]


def test_of_more_objects_than_the_cap_the_best_fitting_get_one_unit():
    fit = torch.tensor([0.3, 0.9, 0.1, 0.5])
    assert units_of(fit.unsqueeze(-1).expand(4, 3), max_positives=2).tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize(("objects", "cap", "expected"), [(10, 40, 4), (20, 40, 2), (3, 9, 3)])
def test_rounding_of_floats_loses_no_unit(objects, cap, expected):
    iou = torch.ones(objects, 5)  # five units each
    assert units_of(iou, max_positives=cap).tolist() == [expected] * objects


def test_of_equally_fitting_objects_beyond_the_cap_the_first_get_a_unit():
    assert units_of(torch.ones(3, 3), max_positives=2).tolist() == [1, 1, 0]


def test_without_a_minimum_what_does_not_fit_gets_nothing():
    iou = torch.tensor([[0.9, 0.9, 0.9], [0.1, 0.1, 0.1]])
    assert units_of(iou, min_units=0, offset=1.0).tolist() == [1, 0]
    assert units_of(iou, min_units=0, max_positives=2).tolist() == [1, 0]


def test_padding_gets_nothing_and_changes_nothing():
    iou = torch.rand(3, 12)
    mask = torch.tensor([True, False, True])
    found = units_of(iou, mask=mask, max_positives=5)
    assert found.tolist()[1] == 0
    assert torch.equal(found[mask], units_of(iou[mask], max_positives=5))


@pytest.mark.parametrize("objects", [0, 1, 7, 40, 120])
@pytest.mark.parametrize("order", ["step_then_cap", "cap_then_step"])
@pytest.mark.parametrize("rounding", ["floor", "round"])
def test_at_least_a_fifth_of_the_proposals_stays_background(objects, order, rounding):
    rule = UnitRule(num_stages=6, order=order, rounding=rounding)
    iou = torch.rand(6, 2, objects, 100) ** 0.2
    mask = torch.ones(2, objects, dtype=torch.bool)
    found = rule(iou, mask, SIX_STAGES)
    assert found.sum(dim=-1).max() <= 80
    if 0 < objects <= 80:
        assert found.min() >= 1


def test_units_never_shrink_from_stage_to_stage():
    rule = UnitRule(num_stages=6)
    found = rule(torch.rand(2, 5, 100).expand(6, 2, 5, 100), torch.ones(2, 5).bool(), SIX_STAGES)
    assert (found.diff(dim=0) >= 0).all()
    assert found[-1].sum() > found[0].sum()


@pytest.mark.parametrize(("fraction", "proposals", "expected"), [
    (0.8, 300, 240), (0.8, 100, 80), (0.29, 100, 29), (0.8, 1, 1), (1.0, 7, 7),
])  # fmt: skip
def test_the_cap_is_a_part_of_the_proposals_and_at_least_one(fraction, proposals, expected):
    assert UnitRule(6, max_positive_fraction=fraction).max_positives(proposals) == expected


def test_ious_of_zero_give_one_unit():
    assert units_of(torch.zeros(2, 5)).tolist() == [1, 1]
    assert not math.isnan(units_of(torch.zeros(0, 5)).sum().item())
