import itertools
import math

import pytest
import torch
from scenes import one, scene
from scipy.optimize import linear_sum_assignment

from dsrcnn.modeling.matching import (
    CostSettings,
    HungarianMatcher,
    assign_one_to_one,
    pairwise_costs,
)
from dsrcnn.structures import Predictions


def matcher():
    return HungarianMatcher(costs=CostSettings())


@pytest.mark.parametrize("objects", [0, 1, 5, 7])
def test_every_object_gets_one_proposal_as_far_as_there_are_enough(objects):
    mask = torch.ones(1, objects, dtype=torch.bool)
    assignment = assign_one_to_one(torch.rand(1, objects, 5), mask)
    learned = assignment[assignment >= 0]
    assert len(learned) == len(learned.unique()) == min(5, objects)


def test_the_assignment_is_the_cheapest_of_all_permutations():
    cost = torch.rand(1, 3, 5)
    assignment = assign_one_to_one(cost, torch.ones(1, 3, dtype=torch.bool))[0]
    total = sum(cost[0, g, p] for p, g in enumerate(assignment.tolist()) if g >= 0)
    best = min(
        sum(cost[0, g, p] for g, p in enumerate(chosen))
        for chosen in itertools.permutations(range(5), 3)
    )
    assert total == pytest.approx(best)


def test_all_sets_and_images_at_once_equal_one_by_one():
    counts = [3, 0, 9, 12]
    predictions, targets = scene(counts)
    together = matcher()(predictions, targets)
    assert together.shape == (2, 4, 9)
    for q, (b, count) in itertools.product(range(2), enumerate(counts)):
        alone = pairwise_costs(*one(predictions, targets, q, b, count), CostSettings())[0][0, 0]
        objects, proposals = linear_sum_assignment(alone.numpy())
        expected = torch.full((9,), -1)
        expected[torch.from_numpy(proposals)] = torch.from_numpy(objects)
        assert torch.equal(together[q, b], expected)


def test_permuting_proposals_permutes_the_assignment():
    predictions, targets = scene([4, 6])
    order = torch.randperm(9)
    permuted = Predictions(
        predictions.logits[:, :, order], predictions.boxes[:, :, order], predictions.stage
    )
    assert torch.equal(matcher()(permuted, targets), matcher()(predictions, targets)[:, :, order])


def test_a_batch_without_any_object_is_all_background():
    predictions, targets = scene([0, 0])
    assert torch.equal(matcher()(predictions, targets), torch.full((2, 2, 9), -1))


def test_predictions_that_are_not_finite_do_not_stop_the_matching():
    predictions, targets = scene([3, 4])
    predictions.boxes[0, 0, 2] = math.nan
    predictions.logits[1, 1, 5] = math.nan
    assignment = matcher()(predictions, targets)
    assert (assignment >= 0).sum(dim=-1).tolist() == [[3, 4], [3, 4]]
    assert assignment[0, 0, 2] == assignment[1, 1, 5] == -1


def test_no_gradient_flows_through_matching():
    predictions, targets = scene([3, 4])
    tracked = Predictions(
        predictions.logits.requires_grad_(), predictions.boxes.requires_grad_(), predictions.stage
    )
    assert not matcher()(tracked, targets).requires_grad
    assert not any(x.requires_grad for x in pairwise_costs(tracked, targets, CostSettings()))


def test_one_step_transfers_costs_to_the_host_once(monkeypatch):
    transfers = []
    original = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda t: transfers.append(t.shape) or original(t))
    matcher()(*scene([3, 5], sets=6))
    assert transfers == [(12, 5, 9)]
