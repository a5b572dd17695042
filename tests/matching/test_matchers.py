"""Matchers: from plans to assignments, what all of them share, statistics, and no host sync."""

import itertools
import math

import pytest
import torch
from detectron2.utils.events import EventStorage
from scenes import (
    ExactTransportMatcher,
    early_scene,
    permute_proposals,
    scene,
    single_problem,
    trained_scene,
)
from scipy.optimize import linear_sum_assignment
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from dsrcnn.modeling.losses import SetCriterion
from dsrcnn.modeling.matching import (
    CostSettings,
    HungarianMatcher,
    OptimalTransportMatcher,
    SimOTAMatcher,
    UnitRule,
    assign_cheapest,
    assign_from_plan,
    assign_one_to_one,
    column_error,
    limit_positives,
    pairwise_costs,
    sinkhorn,
)
from dsrcnn.modeling.matching.matcher import _by_stage, _count
from dsrcnn.modeling.matching.optimal_transport import transport_problem
from dsrcnn.structures import Predictions, Targets, TermWeights
from dsrcnn.utils.events import ScalarLog

COUNTS = [3, 0, 7, 12]


def unit_matcher(kind=OptimalTransportMatcher, *, stages=6, log=None, **rule):
    return kind(costs=CostSettings(), units=UnitRule(stages, **rule), log=log)


HUNGARIAN = HungarianMatcher(costs=CostSettings())
TRANSPORT, SIMOTA = unit_matcher(), unit_matcher(SimOTAMatcher)
EXACT = unit_matcher(ExactTransportMatcher)
WITH_UNITS = {"transport": TRANSPORT, "exact transport": EXACT, "SimOTA": SIMOTA}
ALL = {"Hungarian": HUNGARIAN, **WITH_UNITS}
every_matcher = pytest.mark.parametrize("matcher", ALL.values(), ids=ALL)
every_unit_matcher = pytest.mark.parametrize("matcher", WITH_UNITS.values(), ids=WITH_UNITS)


def units_of(matcher, predictions, targets):
    _, iou = matcher.finite_costs(predictions, targets)
    return matcher.units(iou, targets.mask, predictions.stage)


def problem_of(matcher, predictions, targets):
    cost, _ = matcher.finite_costs(predictions, targets)
    return transport_problem(cost, units_of(matcher, predictions, targets), targets.mask)


@pytest.mark.parametrize("count", [0, 1, 5, 7])
def test_every_ground_truth_gets_one_proposal_while_there_are_enough(count):
    mask = torch.ones(1, count, dtype=torch.bool)
    assignment = assign_one_to_one(torch.rand(1, count, 5), mask)
    matched = assignment[assignment >= 0]
    assert len(matched) == len(matched.unique()) == min(5, count)


def test_one_to_one_assignment_is_the_cheapest_of_all_permutations():
    cost = torch.rand(1, 3, 5)
    assignment = assign_one_to_one(cost, torch.ones(1, 3, dtype=torch.bool))[0]
    total = sum(cost[0, g, p] for p, g in enumerate(assignment.tolist()) if g >= 0)
    permutations = itertools.permutations(range(5), 3)
    assert total == pytest.approx(min(sum(cost[0, range(3), order]) for order in permutations))


def test_hungarian_matching_agrees_with_scipy_on_every_image():
    counts = [3, 0, 9, 12]
    predictions, targets = scene(counts)
    assignment = HUNGARIAN(predictions, targets)
    assert assignment.shape == (2, 4, 9)
    for q, (b, count) in itertools.product(range(2), enumerate(counts)):
        problem = single_problem(predictions, targets, q, b, count)
        cost = pairwise_costs(*problem, CostSettings())[0][0, 0]
        rows, proposals = map(torch.from_numpy, linear_sum_assignment(cost.numpy()))
        assert torch.equal(assignment[q, b], torch.full((9,), -1).scatter(0, proposals, rows))


def test_hungarian_matching_transfers_costs_to_the_host_once(monkeypatch):
    transfers, cpu = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda t: transfers.append(t.shape) or cpu(t))
    HUNGARIAN(*scene([3, 5], sets=6))
    assert transfers == [(12, 5, 9)]


@pytest.mark.parametrize(("plan", "assignment"), [
    # Background has more of every proposal, but the second is the best of the ground truth.
    ([[0.1, 0.4, 0.2], [0.9, 0.6, 0.8]], [-1, 0, -1]),
    # The second row ties with background only; two rows compete for the first proposal.
    ([[0.3, 0.1, 0], [0.2, 0, 0.6], [0.4, 0, 0.1], [0.1, 0.1, 0.1]], [2, -1, 1]),
    ([[0.2, 0.1], [0.8, 0.8]], [0, -1]),
    ([[0.0, 0.0], [0.7, 0.3], [0.3, 0.7]], [1, -1]),  # a row without supply
])  # fmt: skip
def test_plan_rows_compete_relative_to_their_largest_entry_and_background_loses_ties(
    plan, assignment
):
    assert assign_from_plan(torch.tensor(plan)).tolist() == assignment


def test_limit_keeps_the_largest_entries():
    plan = torch.tensor([[0.9, 0.8, 0.1, 0.0], [0.1, 0.2, 0.1, 0.05], [0.0, 0.0, 0.5, 0.9]])
    assignment = torch.tensor([0, 0, 1, -1])  # entries 1, 0.89 and 0.5 of their rows
    for limit, kept in ((4, [0, 0, 1, -1]), (2, [0, 0, -1, -1]), (1, [0, -1, -1, -1])):
        limited = limit_positives(assignment, plan, torch.tensor(limit))
        assert limited.tolist() == kept


def test_cheapest_proposals_are_assigned_and_contested_ones_go_to_the_cheaper_pair():
    cost = torch.tensor([[1.0, 2.0, 3.0, 4.0], [9.0, 1.0, 5.0, 8.0], [0.5, 6.0, 7.0, 8.0]])
    assert assign_cheapest(cost, torch.tensor([2, 1, 0])).tolist() == [0, 1, -1, -1]
    assert assign_cheapest(cost, torch.tensor([2, 2, 0])).tolist() == [0, 1, 1, -1]
    assert assign_cheapest(cost, torch.tensor([1, 0, 1])).tolist() == [2, -1, -1, -1]


@pytest.mark.parametrize("proposals", [20, 100])
def test_exact_transport_of_one_unit_each_is_the_hungarian_assignment(proposals):
    predictions, targets = scene(COUNTS, proposals=proposals, sets=6)
    matcher = unit_matcher(ExactTransportMatcher, static_units=1, unit_step=0.0)
    assert torch.equal(matcher(predictions, targets), HUNGARIAN(predictions, targets))


def test_supply_equals_demand_in_images_without_objects_and_in_crowds():
    problem = problem_of(TRANSPORT, *scene([0, 1, 9, 45, 60], proposals=50, sets=6))
    supply = problem[1]
    assert (supply.sum(dim=-1) == 50).all()
    assert (supply >= 0).all()
    background = supply[..., -1].amin(dim=0)
    assert (background[:3] >= 10).all()
    assert background[3:].tolist() == [5, 0]  # every object gets a unit as long as there are any


@every_matcher
def test_assignment_of_a_batch_agrees_with_one_by_one(matcher):
    predictions, targets = trained_scene(COUNTS)
    assignment = matcher(predictions, targets)
    assert assignment.shape == (6, 4, 100)
    for q, (b, count) in itertools.product(range(6), enumerate(COUNTS)):
        alone = matcher(*single_problem(predictions, targets, q, b, count))
        assert torch.equal(assignment[q, b], alone[0, 0]), (q, b)


@every_matcher
def test_permuting_proposals_or_ground_truths_permutes_the_assignment(matcher):
    predictions, targets = scene([6], proposals=30, sets=6)
    expected = matcher(predictions, targets)
    order = torch.randperm(30)
    permuted = matcher(permute_proposals(predictions, order), targets)
    assert torch.equal(permuted, expected[:, :, order])
    order = torch.randperm(6)
    renumbered = matcher(predictions, Targets(*(t[:, order] for t in targets[:3]), targets.sizes))
    numbers = torch.cat([order, torch.tensor([-1])])  # index -1 is the last entry
    assert torch.equal(numbers[renumbered], expected)


@every_unit_matcher
def test_ground_truths_get_several_proposals_and_more_of_them_at_later_stages(matcher):
    predictions, targets = trained_scene([5, 8])  # the same predictions at all stages
    positives = (matcher(predictions, targets) >= 0).sum(dim=(1, 2)).tolist()
    assert positives[-1] > 1.5 * 13
    assert positives[-1] > positives[0] >= 12
    if matcher is EXACT:
        assert positives == sorted(positives)


@pytest.mark.parametrize("matcher", [EXACT, SIMOTA], ids=["exact transport", "SimOTA"])
def test_ground_truths_never_get_more_proposals_than_units(matcher):
    predictions, targets = trained_scene([5, 8])
    units = units_of(matcher, predictions, targets)
    assignment = matcher(predictions, targets)
    counts = F.one_hot(assignment + 1, 9)[..., 1:].sum(dim=-2)
    assert (counts <= units).all()
    assert matcher is SIMOTA or torch.equal(counts, units)


def test_entropic_transport_is_close_to_exact_transport():
    predictions, targets = trained_scene([5, 8])
    differs = TRANSPORT(predictions, targets) != EXACT(predictions, targets)
    assert differs.sum(dim=-1).float().mean() < 6


@pytest.mark.parametrize("count", [3, 40, 48, 120, 400])
@pytest.mark.parametrize("identical", [False, True])
@every_unit_matcher
def test_a_fifth_is_left_to_background_unless_there_are_more_objects(matcher, count, identical):
    predictions, targets = scene([count, 2], proposals=50, sets=6)
    if identical:
        predictions = permute_proposals(predictions, torch.zeros(50, dtype=torch.int64))
    assignment = matcher(predictions, targets)
    assert ((assignment < 0).sum(dim=-1) >= min(10, max(50 - count, 0))).all()
    assert ((assignment < 0).sum(dim=-1)[:, 1] >= 10).all()
    assert ((assignment >= 0).sum(dim=-1) >= 1).all()
    assert assignment.max() < count


@pytest.mark.parametrize("seed", range(3))
def test_row_normalization_matches_most_objects_early_and_a_plain_arg_max_hardly_any(seed):
    predictions, targets = early_scene(7, seed=seed)
    matcher = unit_matcher(stages=1)
    plain = sinkhorn(*problem_of(matcher, predictions, targets)).argmax(dim=-2)
    index = torch.arange(7)
    assert torch.isin(index, plain).sum() <= 1
    assert torch.isin(index, matcher(predictions, targets)).sum() >= 5


@every_matcher
def test_matching_works_without_objects_and_with_more_of_them_than_proposals(matcher):
    assignment = matcher(*scene([2, 9], proposals=3, sets=6))
    assert ((assignment >= 0).sum(dim=-1) >= 1).all()
    assert torch.equal(matcher(*scene([0, 0])), torch.full((2, 2, 9), -1))


@every_matcher
def test_proposals_that_are_not_finite_become_background_and_affect_no_other(matcher):
    predictions, targets = trained_scene([3, 4])
    boxes, logits = predictions.boxes.clone(), predictions.logits.clone()
    boxes[:, 0, 2], logits[:, 1, 5] = math.nan, math.nan
    boxes[:, 0, 3, 2:] = boxes[:, 0, 3, :2] - 5  # corners in the wrong order
    boxes[:, 1, 7] = 1e30
    assignment = matcher(predictions._replace(boxes=boxes, logits=logits), targets)
    assert (assignment[:, [0, 1], [2, 5]] == -1).all()
    positives = (assignment >= 0).sum(dim=-1)
    assert (positives >= 3).all()
    assert matcher is not HUNGARIAN or positives.tolist() == [[3, 4]] * 6
    diverged = predictions._replace(boxes=torch.full_like(boxes, math.nan))
    assert -1 <= matcher(diverged, targets).min() <= matcher(diverged, targets).max() < 4


@every_matcher
def test_matching_has_no_gradient_and_uses_no_half_precision(matcher):
    predictions, targets = trained_scene([3, 4])
    expected = matcher(predictions, targets)
    tracked = Predictions(*(x.clone().requires_grad_() for x in predictions[:2]), predictions.stage)
    with torch.autocast("cpu", torch.bfloat16):
        assignment = matcher(tracked, targets)
        costs = matcher.finite_costs(tracked, targets)
    assert not any(x.requires_grad for x in (assignment, *costs))
    assert torch.equal(assignment, expected)


def logged(matcher, predictions, targets):
    """The assignment, and the scalars ``dla/*`` of one logged call."""
    with EventStorage() as storage:
        assignment = matcher(predictions, targets)
    return assignment, {k.removeprefix("dla/"): v for k, (v, _) in storage.latest().items()}


def by_stage(scalars, name):
    return [scalars[f"{name}_{stage}"] for stage in range(5)] + [scalars[name]]


def test_statistics_by_stage_agree_with_the_assignment_the_units_and_the_plan():
    predictions, targets = trained_scene([2, 4])
    assignment, scalars = logged(unit_matcher(log=ScalarLog(1)), predictions, targets)
    names = ("positives", "unmatched", "units_mean", "units_max", "column_error")
    assert set(scalars) == {n + s for n in names for s in ("", "_0", "_1", "_2", "_3", "_4")}
    units = units_of(TRANSPORT, predictions, targets)
    positives = (assignment >= 0).sum(dim=-1).float().mean(dim=-1)
    error = column_error(sinkhorn(*problem_of(TRANSPORT, predictions, targets))).amax(dim=-1)
    expected = positives, torch.zeros(6), units.sum((1, 2)) / 6, units.amax((1, 2)), error
    for name, values in zip(names, expected, strict=True):
        assert by_stage(scalars, name) == pytest.approx(values.tolist())


def test_statistics_count_ground_truths_without_a_proposal():
    matcher = HungarianMatcher(costs=CostSettings(), log=ScalarLog(1))
    _, scalars = logged(matcher, *scene([12, 2], proposals=9, sets=6))
    assert by_stage(scalars, "positives") == [(9 + 2) / 2] * 6
    assert by_stage(scalars, "unmatched") == [3 / 2] * 6
    _, scalars = logged(unit_matcher(log=ScalarLog(1)), *scene([0, 0], sets=6))
    assert by_stage(scalars, "positives") == by_stage(scalars, "unmatched") == [0.0] * 6


def test_groups_of_a_stage_are_averaged_but_of_maxima_the_largest_is_logged():
    values = torch.tensor([1.0, 3.0, 5.0])
    scalars = _by_stage({"units_mean": values, "units_max": values}, torch.tensor([0, 0, 1]))
    expected = {"units_mean_0": 2.0, "units_max_0": 3.0, "units_mean": 5.0, "units_max": 5.0}
    assert scalars == expected


without_sync = pytest.mark.parametrize("matcher", [TRANSPORT, SIMOTA], ids=["transport", "SimOTA"])


def step(matcher, predictions, targets, normalizer="positives"):
    """Assignment, losses and statistics, as in a training step."""
    criterion = SetCriterion(
        num_classes=20, num_stages=6, weights=TermWeights(), normalizer=normalizer
    )
    cost, iou = matcher.finite_costs(predictions, targets)
    statistics = {}
    assignment = matcher.assign(cost, iou, predictions.stage, targets, statistics)
    losses = criterion(predictions, targets, matcher(predictions, targets))
    return assignment, *losses.values(), *statistics.values(), *_count(assignment, targets).values()


@pytest.mark.parametrize("normalizer", ["positives", "gt"])
@without_sync
def test_no_step_of_matching_reads_a_value_from_the_device(matcher, normalizer):
    """Tensors without values: reading one, or a shape that depends on one, raises."""
    predictions, targets = trained_scene([3, 4])
    empty = lambda xs: [torch.empty(x.shape, dtype=x.dtype, device="cuda") for x in xs]  # noqa: E731
    with FakeTensorMode(), torch.no_grad():
        fake = Predictions(*empty(predictions[:3])), Targets(*empty(targets))
        results = step(matcher, *fake, normalizer)
    assert all(value.device.type == "cuda" for value in results)


@pytest.mark.parametrize(
    "read", [lambda x: x[x > 0], lambda x: x.sum().item(), torch.nonzero, lambda x: bool(x.any())]
)
def test_tensors_without_values_reveal_a_read(read):
    with FakeTensorMode(), pytest.raises(Exception, match=r"nonzero|_local_scalar_dense"):
        read(torch.empty(3, device="cuda"))


@without_sync
def test_matcher_compiles_to_one_graph(matcher):
    predictions, targets = trained_scene([3, 4])
    compiled = torch.compile(matcher, backend="eager", fullgraph=True)
    assert torch.equal(compiled(predictions, targets), matcher(predictions, targets))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@without_sync
def test_on_a_gpu_nothing_synchronizes_and_a_graph_can_be_captured(matcher):
    predictions, targets = trained_scene([3, 4])
    predictions = Predictions(*(x.cuda() for x in predictions[:3]))
    targets = Targets(*(x.cuda() for x in targets))
    expected = step(matcher, predictions, targets)[0]  # warms up
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        assignment = step(matcher, predictions, targets)[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(assignment, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assignment = step(matcher, predictions, targets)[0]
    graph.replay()
    assert torch.equal(assignment, expected)
