"""Scenes for matchers: predictions and targets, random or early in training."""

import math

import torch

from dsrcnn.structures import Predictions, Targets


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


def one(predictions, targets, q, b, count):
    """The problem of one set and image, without padding."""
    alone = Predictions(
        predictions.logits[q : q + 1, b : b + 1],
        predictions.boxes[q : q + 1, b : b + 1],
        predictions.stage[q : q + 1],
    )
    boxes, labels, mask = (t[b : b + 1, :count] for t in targets[:3])
    return alone, Targets(boxes, labels, mask, targets.sizes[b : b + 1])


def early_scene(objects=7, *, proposals=300, classes=20, seed=0):
    """The start of training: all boxes are nearly the whole image, all scores near the prior.

    The scores differ as much as those of a class tower with fresh weights. Without that, all
    objects would prefer the one smallest proposal.
    """
    predictions, targets = scene([objects], proposals=proposals, sets=1, classes=classes, seed=seed)
    g = torch.Generator().manual_seed(seed)
    noise = torch.randn(predictions.boxes.shape, generator=g) * 0.01
    boxes = (torch.tensor([0.0, 0, 1, 1]) + noise) * targets.sizes[0]
    logits = -4.6 + 0.4 * torch.randn(predictions.logits.shape, generator=g)
    return predictions._replace(boxes=boxes, logits=logits), targets


def trained_scene(counts, *, proposals=100, sets=6, classes=20, seed=0):
    """Later: proposals scatter around the objects, with scores that follow their overlap."""
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
