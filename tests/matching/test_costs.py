import math

import pytest
import torch
from scenes import scene

from dsrcnn.modeling.matching import CostSettings, pairwise_costs
from dsrcnn.modeling.matching.costs import class_cost
from dsrcnn.structures import Predictions, Targets, TermWeights


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
    cost, iou = pairwise_costs(predictions, targets, CostSettings(TermWeights(2.0, 5.0, 2.0)))
    assert iou.item() == pytest.approx(1 / 3)
    assert cost.item() == pytest.approx(2 * -0.0866434 + 5 * 0.5 - 2 / 3, abs=1e-5)


def test_costs_are_those_of_background_subtracted_from_those_of_the_ground_truth():
    """Transport: focal loss of the one-hot class minus focal loss of no class, all classes."""
    predictions, targets = scene([3], sets=1)
    cost, _ = pairwise_costs(predictions, targets, CostSettings(TermWeights(2.0, 0.0, 0.0)))
    p = predictions.logits[0, 0].double().sigmoid()  # (P, C)

    def focal(one_hot):
        positive = 0.25 * (1 - p) ** 2 * -p.log() * one_hot
        return (positive + 0.75 * p**2 * -(1 - p).log() * (1 - one_hot)).sum(dim=-1)

    for row, label in enumerate(targets.labels[0]):
        one_hot = torch.nn.functional.one_hot(label, 4)
        expected = 2 * (focal(one_hot) - focal(torch.zeros(4)))
        torch.testing.assert_close(cost[0, 0, row].double(), expected, atol=1e-5, rtol=1e-5)


def test_costs_of_a_scaled_image_are_the_same():
    predictions, targets = scene([3, 5])
    scaled = predictions._replace(boxes=predictions.boxes * 3)
    larger = targets._replace(boxes=targets.boxes * 3, sizes=targets.sizes * 3)
    mask = targets.mask.unsqueeze(-1).expand(2, -1, -1, 9)
    for found, expected in zip(
        pairwise_costs(scaled, larger, CostSettings()),
        pairwise_costs(predictions, targets, CostSettings()),
        strict=True,
    ):
        torch.testing.assert_close(found[mask], expected[mask])
