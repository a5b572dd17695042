import itertools
import math

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from dsrcnn.modeling.matching import HungarianMatcher, assign_one_to_one, pairwise_costs
from dsrcnn.modeling.matching.costs import class_cost
from dsrcnn.structures import Predictions, Targets, TermWeights


def scene(counts, *, proposals=9, sets=2, classes=4, seed=0):
    """Random predictions and targets; the padding of the targets is garbage."""
    g = torch.Generator().manual_seed(seed)
    images, padded = len(counts), max(counts, default=0)
    sizes = torch.tensor([[200.0, 100, 200, 100]]).repeat(images, 1)

    def boxes(*shape):
        corner = torch.rand(*shape, 2, generator=g) * sizes[0, :2] * 0.7
        return torch.cat([corner, corner + 5 + torch.rand(*shape, 2, generator=g) * 30], dim=-1)

    mask = torch.arange(padded) < torch.tensor(counts).unsqueeze(1)
    wanted = boxes(images, padded).masked_fill(~mask.unsqueeze(-1), math.nan)
    labels = torch.randint(0, classes, (images, padded), generator=g)
    logits = torch.randn(sets, images, proposals, classes, generator=g)
    predictions = Predictions(logits, boxes(sets, images, proposals), torch.arange(sets))
    return predictions, Targets(wanted, labels, mask, sizes)


def matcher(**kwargs):
    return HungarianMatcher(weights=TermWeights(), focal=True, **kwargs)


@pytest.mark.parametrize(
    ("probability", "cost"), [(0.01, 1.128381), (0.5, -0.086643), (0.9, -1.398557)]
)
def test_focal_class_cost_has_the_values_worked_out_by_hand(probability, cost):
    logits = torch.tensor([[[[math.log(probability / (1 - probability)), 5.0]]]])
    found = class_cost(logits, torch.tensor([[0]]), focal=True)
    assert found.item() == pytest.approx(cost, abs=1e-5)


def test_softmax_class_cost_is_minus_the_probability():
    found = class_cost(torch.tensor([[[[0.0, math.log(3.0)]]]]), torch.tensor([[1]]), focal=False)
    assert found.item() == pytest.approx(-0.75)


def test_total_cost_is_the_weighted_sum_of_its_terms():
    # One proposal, one ground truth, shifted by half its width: IoU = GIoU = 1/3; L1 over 20 = 0.5
    boxes, wanted = torch.tensor([0.0, 0, 10, 10]), torch.tensor([5.0, 0, 15, 10])
    predictions = Predictions(torch.zeros(1, 1, 1, 3), boxes.view(1, 1, 1, 4), torch.tensor([0]))
    sizes = torch.tensor([[20.0, 20, 20, 20]])
    targets = Targets(
        wanted.view(1, 1, 4), torch.tensor([[2]]), torch.ones(1, 1, dtype=torch.bool), sizes
    )
    cost = pairwise_costs(predictions, targets, TermWeights(2.0, 5.0, 2.0), focal=True)
    assert cost.item() == pytest.approx(2 * -0.0866434 + 5 * 0.5 - 2 / 3, abs=1e-5)


@pytest.mark.parametrize("objects", [0, 1, 5, 7])
def test_every_object_gets_one_proposal_as_far_as_there_are_enough(objects):
    mask = torch.ones(1, objects, dtype=torch.bool)
    assignment = assign_one_to_one(torch.rand(1, 5, objects), mask)
    learned = assignment[assignment >= 0]
    assert len(learned) == len(learned.unique()) == min(5, objects)


def test_the_assignment_is_the_cheapest_of_all_permutations():
    cost = torch.rand(1, 5, 3)
    assignment = assign_one_to_one(cost, torch.ones(1, 3, dtype=torch.bool))[0]
    total = sum(cost[0, p, g] for p, g in enumerate(assignment.tolist()) if g >= 0)
    best = min(
        sum(cost[0, p, g] for g, p in enumerate(chosen))
        for chosen in itertools.permutations(range(5), 3)
    )
    assert total == pytest.approx(best)


def test_a_cost_that_is_not_finite_ranks_last():
    cost = torch.tensor([[[0.1, math.nan], [math.inf, 0.2]]])
    assert assign_one_to_one(cost, torch.ones(1, 2, dtype=torch.bool)).tolist() == [[0, 1]]


def test_all_sets_and_images_at_once_equal_one_by_one():
    counts = [3, 0, 9, 12]
    predictions, targets = scene(counts)
    together = matcher()(predictions, targets)
    assert together.shape == (2, 4, 9)
    for q, (b, count) in itertools.product(range(2), enumerate(counts)):
        alone = pairwise_costs(
            Predictions(
                predictions.logits[q : q + 1, b : b + 1],
                predictions.boxes[q : q + 1, b : b + 1],
                torch.tensor([0]),
            ),
            Targets(
                *(
                    t[b : b + 1, :count] if t.dim() != 2 or t is not targets.sizes else t[:1]
                    for t in targets
                )
            ),
            TermWeights(),
            focal=True,
        )[0, 0]
        rows, columns = linear_sum_assignment(alone.numpy())
        expected = torch.full((9,), -1)
        expected[torch.from_numpy(rows)] = torch.from_numpy(columns)
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
    assert not pairwise_costs(tracked, targets, TermWeights(), focal=True).requires_grad


def test_one_step_transfers_costs_to_the_host_once(monkeypatch):
    transfers = []
    original = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda t: transfers.append(t.shape) or original(t))
    matcher()(*scene([3, 5], sets=6))
    assert transfers == [(12, 9, 5)]
