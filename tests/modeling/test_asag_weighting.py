"""ASAG's weights and losses against numbers of the published code."""

import pytest
import torch

from dsrcnn.modeling.asag.criterion import (
    area_weight,
    quality_focal_loss,
    query_weights,
    weighted_class_loss,
)


@pytest.mark.parametrize(
    ("score", "iou", "positive", "negative"),
    [
        (0.5, 0.5, 0.7130, 0.5897),
        (0.9, 0.9, 0.9738, 0.1302),
        (0.1, 0.3, 0.3648, 0.4093),
        (0.5, 0.1, 0.3616, 0.7229),
        (1.0, 1.0, 1.0, 0.0),
        (1.0, 0.0, 0.1915, 0.8085),
    ],
)
def test_query_weights(score, iou, positive, negative):
    found = query_weights(torch.tensor(score), torch.tensor(iou))
    assert [x.item() for x in found] == pytest.approx([positive, negative], abs=1e-4)


def test_query_weights_are_monotone_and_without_gradient():
    grid = torch.linspace(0, 1, 21)
    scores, ious = torch.meshgrid(grid, grid, indexing="ij")
    positive, negative = query_weights(scores.requires_grad_(), ious)
    assert not positive.requires_grad
    assert (positive.diff(dim=0) >= 0).all()
    assert (positive.diff(dim=1) >= 0).all()
    assert (negative.diff(dim=1) <= 1e-6).all()
    assert negative[:, -1].abs().max() < 1e-6


@pytest.mark.parametrize(
    ("size", "weight", "inverse"),
    [((0.1, 0.1), 3.7, 1.3), ((0.5, 0.5), 2.5, 2.5), ((1, 1), 1, 4), ((0.04, 0.01), 3.94, 1.06)],
)
def test_area_weights(size, weight, inverse):
    size = torch.tensor(size, dtype=torch.float32)
    assert area_weight(size).item() == pytest.approx(weight)
    assert area_weight(size, inverse=True).item() == pytest.approx(inverse)


def test_the_class_loss():
    logits = torch.tensor([[0.0, 2], [-1, 1]])
    matched = torch.tensor([[False, True], [False, False]])
    part = torch.tensor([0.8, 0.0]), torch.tensor([0.3, 0.0]), torch.tensor([2.0, 1.0])
    found = weighted_class_loss(logits, matched, *part).flatten().tolist()
    assert found == pytest.approx([0.173287, 1.479242, 0.022658, 0.701868], abs=1e-5)


def test_the_quality_focal_loss():
    logits = torch.tensor([0.5, -1.0, 2.0])
    matched = torch.tensor([True, False, False])
    quality, ignored = torch.tensor([0.7, 0.2, 0.6]), torch.tensor([False, False, True])
    weight = torch.tensor([2.0, 1.0, 1.0])
    found = quality_focal_loss(logits, quality, matched, ignored, weight)
    assert found.sum().item() == pytest.approx(0.030163, abs=1e-5)
    assert found[2] == 0
