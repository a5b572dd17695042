import itertools
import math

import pytest
import torch
from scenes import early_scene, one, scene, trained_scene
from torch.nn import functional as F

from dsrcnn.modeling.matching import (
    CostSettings,
    HungarianMatcher,
    OptimalTransportMatcher,
    SimOTAMatcher,
    UnitRule,
    sinkhorn,
)
from dsrcnn.modeling.matching.optimal_transport import Transport
from dsrcnn.structures import Predictions, Targets

COUNTS = [3, 0, 7, 12]


def transport(*, stages=6, decision="rescale", repair=0, iterations=50, **rule):
    return OptimalTransportMatcher(
        costs=CostSettings(),
        units=UnitRule(stages, **rule),
        decision=decision,
        repair=repair,
        iterations=iterations,
    )


def simota(*, stages=6, repair=0, **rule):
    return SimOTAMatcher(costs=CostSettings(), units=UnitRule(stages, **rule), repair=repair)


ALL = {
    "rescale": transport(),
    "topk": transport(decision="topk"),
    "exact": transport(decision="exact"),
    "repaired": transport(repair=3),
    "simota": simota(),
    "simota repaired": simota(repair=3),
}
every_matcher = pytest.mark.parametrize("matcher", ALL.values(), ids=ALL)


@pytest.mark.parametrize("proposals", [20, 100])
def test_with_one_unit_each_the_exact_assignment_is_the_hungarian_one(proposals):
    predictions, targets = scene(COUNTS, proposals=proposals, sets=6)
    matcher = transport(decision="exact", static_units=1, unit_step=0.0)
    hungarian = HungarianMatcher(costs=CostSettings())
    assert torch.equal(matcher(predictions, targets), hungarian(predictions, targets))


def test_supply_equals_demand_in_every_image_also_without_objects_and_in_crowds():
    predictions, targets = scene([0, 1, 9, 60], proposals=50, sets=6)
    cost, iou = transport().finite_costs(predictions, targets)
    units = UnitRule(6)(iou, targets.mask, predictions.stage)
    problem = Transport.of(cost, units, targets.mask)
    assert (problem.supply.sum(dim=-1) == 50).all()
    assert (problem.supply >= 0).all()
    assert (problem.supply[..., -1] >= 10).all()


@every_matcher
def test_all_sets_and_images_at_once_equal_one_by_one(matcher):
    predictions, targets = trained_scene(COUNTS)
    together = matcher(predictions, targets)
    assert together.shape == (6, 4, 100)
    for q, (b, count) in itertools.product(range(6), enumerate(COUNTS)):
        alone = matcher(*one(predictions, targets, q, b, count))
        assert torch.equal(together[q, b], alone[0, 0]), (q, b)


def test_plans_of_all_images_at_once_equal_one_by_one():
    predictions, targets = trained_scene(COUNTS)
    matcher = transport()

    def plan_of(predictions, targets):
        cost, iou = matcher.finite_costs(predictions, targets)
        units = matcher.units(iou, targets.mask, predictions.stage)
        return matcher.plan(Transport.of(cost, units, targets.mask))

    together = plan_of(predictions, targets)
    for q, (b, count) in itertools.product(range(6), enumerate(COUNTS)):
        alone = plan_of(*one(predictions, targets, q, b, count))[0, 0]
        rows = [*range(count), -1]
        torch.testing.assert_close(together[q, b, rows], alone, atol=1e-5, rtol=0)
        assert (together[q, b, count:-1] == 0).all()


@every_matcher
def test_wider_padding_changes_nothing(matcher):
    predictions, targets = trained_scene(COUNTS)
    wider = Targets(
        F.pad(targets.boxes, (0, 0, 0, 5), value=math.nan),
        F.pad(targets.labels, (0, 5)),
        F.pad(targets.mask, (0, 5)),
        targets.sizes,
    )
    assert torch.equal(matcher(predictions, wider), matcher(predictions, targets))


@every_matcher
def test_permuting_proposals_or_ground_truths_permutes_the_assignment(matcher):
    predictions, targets = scene([6], proposals=30, sets=6)
    expected = matcher(predictions, targets)
    order = torch.randperm(30)
    permuted = Predictions(
        predictions.logits[:, :, order], predictions.boxes[:, :, order], predictions.stage
    )
    assert torch.equal(matcher(permuted, targets), expected[:, :, order])
    order = torch.randperm(6)
    renamed = Targets(*(t[:, order] for t in targets[:3]), targets.sizes)
    found = matcher(predictions, renamed)
    names = torch.cat([order, torch.tensor([-1])])  # index -1 finds the last entry
    assert torch.equal(names[found], expected)


@every_matcher
def test_flipping_boxes_and_ground_truths_changes_nothing(matcher):
    predictions, targets = trained_scene([5, 8])

    def flip(boxes):
        return torch.stack(
            [200 - boxes[..., 2], boxes[..., 1], 200 - boxes[..., 0], boxes[..., 3]], -1
        )

    flipped = predictions._replace(boxes=flip(predictions.boxes))
    mirrored = targets._replace(boxes=flip(targets.boxes))
    agreement = matcher(flipped, mirrored) == matcher(predictions, targets)
    assert agreement.float().mean() > 0.995  # ties of rounding aside


@every_matcher
def test_several_proposals_learn_an_object_and_more_of_them_at_later_stages(matcher):
    predictions, targets = trained_scene([5, 8])  # the same predictions at all stages
    positives = (matcher(predictions, targets) >= 0).sum(dim=(1, 2)).tolist()
    assert positives[-1] > 1.5 * 13
    assert positives[0] >= 12
    if matcher is ALL["exact"]:
        assert positives == sorted(positives)
    assert positives[-1] > positives[0]


@pytest.mark.parametrize("name", ["topk", "exact", "simota"])
def test_an_object_never_gets_more_than_its_units(name):
    predictions, targets = trained_scene([5, 8])
    matcher = ALL[name]
    _, iou = matcher.finite_costs(predictions, targets)
    units = matcher.units(iou, targets.mask, predictions.stage)
    found = matcher(predictions, targets)
    counts = F.one_hot(found + 1, 9)[..., 1:].sum(dim=-2)
    assert (counts <= units).all()
    if name == "exact":
        assert torch.equal(counts, units)


@pytest.mark.parametrize("name", ["rescale", "topk"])
def test_transport_is_close_to_the_exact_assignment(name):
    predictions, targets = trained_scene([5, 8])
    found, exact = ALL[name](predictions, targets), ALL["exact"](predictions, targets)
    assert (found != exact).sum(dim=-1).float().mean() < 6


@pytest.mark.parametrize("objects", [40, 120, 400])
@every_matcher
def test_crowds_leave_a_fifth_of_the_proposals_to_background(matcher, objects):
    predictions, targets = scene([objects, 2], proposals=50, sets=6)
    found = matcher(predictions, targets)
    assert ((found < 0).sum(dim=-1) >= 10).all()
    assert (found >= 0).any()
    assert found.max() < objects


@every_matcher
def test_predictions_that_are_all_the_same_leave_a_fifth_to_background(matcher):
    predictions, targets = scene([3], proposals=40, sets=6)
    same = predictions._replace(
        logits=predictions.logits[:, :, :1].expand(-1, -1, 40, -1),
        boxes=predictions.boxes[:, :, :1].expand(-1, -1, 40, -1),
    )
    found = matcher(same, targets)
    assert ((found >= 0).sum(dim=-1) >= 1).all()
    assert ((found < 0).sum(dim=-1) >= 8).all()


@pytest.mark.parametrize("seed", range(3))
def test_rescaling_matches_most_objects_at_the_start_of_training_and_plain_arg_max_hardly_any(seed):
    predictions, targets = early_scene(7, seed=seed)
    matcher = transport(stages=1)
    cost, iou = matcher.finite_costs(predictions, targets)
    units = matcher.units(iou, targets.mask, predictions.stage)
    plain = sinkhorn(*Transport.of(cost, units, targets.mask)).argmax(dim=-2)
    objects = torch.arange(7)
    assert torch.isin(objects, plain).sum() <= 1
    assert torch.isin(objects, matcher(predictions, targets)).sum() >= 5


@pytest.mark.parametrize(
    ("plain", "repaired"), [("rescale", "repaired"), ("simota", "simota repaired")]
)
def test_repair_finds_proposals_for_those_whom_the_decision_leaves_out(plain, repaired):
    predictions, targets = early_scene(20)
    before, after = (ALL[name](predictions, targets) for name in (plain, repaired))
    assert torch.isin(torch.arange(20), before).sum() < 20
    assert torch.isin(torch.arange(20), after).sum() > torch.isin(torch.arange(20), before).sum()
    assert torch.equal(after[before >= 0], before[before >= 0])


@every_matcher
def test_fewer_proposals_than_the_estimate_sums_up(matcher):
    predictions, targets = scene([2, 9], proposals=3, sets=6)
    found = matcher(predictions, targets)
    assert ((found >= 0).sum(dim=-1) >= 1).all()


@every_matcher
def test_predictions_that_are_not_finite_or_degenerate_do_no_harm(matcher):
    predictions, targets = trained_scene([3, 4])
    boxes, logits = predictions.boxes.clone(), predictions.logits.clone()
    boxes[:, 0, 2], logits[:, 1, 5] = math.nan, math.nan
    boxes[:, 0, 3, 2:] = boxes[:, 0, 3, :2] - 5
    boxes[:, 1, 7] = 1e30
    found = matcher(predictions._replace(boxes=boxes, logits=logits), targets)
    assert (found[:, 0, 2] == -1).all()
    assert (found[:, 1, 5] == -1).all()
    assert ((found >= 0).sum(dim=-1) >= 3).all()


@every_matcher
def test_a_model_that_has_diverged_altogether_stops_nothing(matcher):
    predictions, targets = scene([3, 4], sets=6, proposals=20)
    broken = predictions._replace(boxes=torch.full_like(predictions.boxes, math.nan))
    found = matcher(broken, targets)
    assert found.min() >= -1
    assert found.max() < 4


@every_matcher
def test_a_batch_without_any_object_is_all_background(matcher):
    predictions, targets = scene([0, 0])
    assert torch.equal(matcher(predictions, targets), torch.full((2, 2, 9), -1))


@every_matcher
def test_no_gradient_flows_through_matching_and_half_precision_is_not_used(matcher):
    predictions, targets = trained_scene([3, 4])
    expected = matcher(predictions, targets)
    tracked = Predictions(*(x.clone().requires_grad_() for x in predictions[:2]), predictions.stage)
    with torch.autocast("cpu", torch.bfloat16):
        found = matcher(tracked, targets)
    assert not found.requires_grad
    assert torch.equal(found, expected)


def test_statistics_say_what_happened():
    predictions, targets = trained_scene([2, 4])
    matcher = ALL["exact"]
    found = matcher(predictions, targets)
    statistics = matcher.statistics(predictions, targets, found)
    positives = (found >= 0).sum(dim=-1).float().mean(dim=-1)
    torch.testing.assert_close(statistics["positives"], positives)
    assert statistics["unmatched"].tolist() == [0.0] * 6
    assert statistics["units_mean"].tolist() == pytest.approx((positives * 2 / 6).tolist())
    assert (statistics["units_max"] >= statistics["units_mean"]).all()
    assert "column_error" not in statistics
    found[:, 1] = -1
    assert matcher.statistics(predictions, targets, found)["unmatched"].tolist() == [2.0] * 6


def test_the_column_error_falls_with_the_sweeps():
    predictions, targets = trained_scene([2, 4])
    errors = [
        m.statistics(predictions, targets, m(predictions, targets))["column_error"].max()
        for m in (transport(iterations=2), transport(iterations=200))
    ]
    assert errors[1] < errors[0] / 5
