"""Scenes for matchers (random, early and late in training), and exact transport as their oracle."""

import math

import torch

from dsrcnn.modeling.matching import OptimalTransportMatcher, assign_exact
from dsrcnn.modeling.matching.optimal_transport import transport_problem
from dsrcnn.structures import Predictions, Targets


def scene(counts, *, proposals=9, sets=2, classes=4, seed=0):
    """Random predictions and targets; the padding of the targets is NaN."""
    g = torch.Generator().manual_seed(seed)
    images, padded = len(counts), max(counts, default=0)
    sizes = torch.tensor([[200.0, 100, 200, 100]]).repeat(images, 1)

    def boxes(*shape):
        corner = torch.rand(*shape, 2, generator=g) * sizes[0, :2] * 0.7
        return torch.cat([corner, corner + 5 + torch.rand(*shape, 2, generator=g) * 30], dim=-1)

    mask = torch.arange(padded) < torch.tensor(counts).unsqueeze(1)
    gt_boxes = boxes(images, padded).masked_fill(~mask.unsqueeze(-1), math.nan)
    labels = torch.randint(0, classes, (images, padded), generator=g)
    logits = torch.randn(sets, images, proposals, classes, generator=g)
    predictions = Predictions(logits, boxes(sets, images, proposals), torch.arange(sets))
    return predictions, Targets(gt_boxes, labels, mask, sizes)


def single_problem(predictions, targets, q, b, count):
    """The problem of one prediction set and one image, without padding."""
    logits, boxes = (x[q : q + 1, b : b + 1] for x in predictions[:2])
    gt_boxes, labels, mask = (t[b : b + 1, :count] for t in targets[:3])
    alone = Predictions(logits, boxes, predictions.stage[q : q + 1])
    return alone, Targets(gt_boxes, labels, mask, targets.sizes[b : b + 1])


def permute_proposals(predictions, order):
    logits, boxes = (x[:, :, order] for x in predictions[:2])
    return Predictions(logits, boxes, predictions.stage)


def early_scene(count=7, *, proposals=300, classes=20, seed=0):
    """Start of training: all boxes are nearly the whole image, all scores near the prior.

    Scores vary as much as those of a class tower with fresh weights. Without that, all ground
    truths would prefer the same proposal, the smallest.
    """
    predictions, targets = scene([count], proposals=proposals, sets=1, classes=classes, seed=seed)
    g = torch.Generator().manual_seed(seed)
    noise = torch.randn(predictions.boxes.shape, generator=g) * 0.01
    boxes = (torch.tensor([0.0, 0, 1, 1]) + noise) * targets.sizes[0]
    logits = -4.6 + 0.4 * torch.randn(predictions.logits.shape, generator=g)
    return predictions._replace(boxes=boxes, logits=logits), targets


def trained_scene(counts, *, proposals=100, sets=6, classes=20, seed=0):
    """Late in training: proposals scatter around objects, their scores follow the overlap."""
    predictions, targets = scene(counts, proposals=proposals, sets=1, classes=classes, seed=seed)
    g = torch.Generator().manual_seed(seed + 1)
    boxes, logits = predictions.boxes[0].clone(), torch.full((*predictions.logits.shape[1:],), -4.0)
    for image, count in enumerate(counts):
        near = torch.arange(proposals) % max(count, 1)
        if count:
            size = (targets.boxes[image, :count, 2:] - targets.boxes[image, :count, :2])[near]
            spread = torch.linspace(0, 1, proposals).unsqueeze(-1)
            shift = torch.randn(proposals, 2, generator=g) * size * 0.5 * spread
            boxes[image] = targets.boxes[image][near] + shift.repeat(1, 2)
            label = targets.labels[image][near]
            logits[image, torch.arange(proposals), label] = 2 - 6 * spread.squeeze(-1)
    expand = (x.expand(sets, *x.shape) for x in (logits, boxes))
    return Predictions(*expand, torch.arange(sets)), targets


class ExactTransportMatcher(OptimalTransportMatcher):
    """What `OptimalTransportMatcher` approximates: every ground truth gets exactly its units."""

    def assign(self, cost, iou, stage, targets, statistics=None):
        units = self.units(iou, targets.mask, stage)
        costs, supplies = transport_problem(cost, units, targets.mask)
        problems = zip(costs.flatten(0, 1), supplies.flatten(0, 1), strict=True)
        rows = torch.stack([assign_exact(*problem) for problem in problems])
        assignment = rows.masked_fill(rows == cost.shape[-2], -1)  # background is the last row
        return assignment.view(*cost.shape[:2], -1)
