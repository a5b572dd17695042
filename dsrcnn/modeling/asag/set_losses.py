"""Matching and losses of ASAG, for images and for patches alike (section 3.5).

Everything is relative: boxes are cxcywh as shares of the image or patch. Letters: ``R`` problems,
each of them an image or a patch, ``P`` predictions, ``M`` objects (padded), ``C`` classes.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...structures import TermWeights, box_cxcywh_to_xyxy, pairwise_overlaps
from ..matching import assign_one_to_one
from ..matching.costs import WORST_COST, bounded_costs, class_cost
from .anchors import Objects
from .weighting import quality_focal_loss, query_weights, weighted_class_loss

__all__ = [
    "Learned",
    "SetLosses",
    "anchor_losses",
    "detection_losses",
    "match",
    "matching_costs",
]

_GOOD = 0.5  # IoU from which an anchor is no background, whoever is matched


class Learned(NamedTuple):
    """What every prediction learns.

    Attributes:
        positive: (R, P) bool, False for background.
        labels: (R, P) int64.
        boxes: (R, P, 4).
        weight: (R, P) of the object.
    """

    positive: Tensor
    labels: Tensor
    boxes: Tensor
    weight: Tensor

    @classmethod
    def from_assignment(cls, assignment: Tensor, objects: Objects, weight: Tensor) -> "Learned":
        """From the index of each prediction's object (R, P), -1 for background."""
        positive = assignment >= 0
        if not objects.mask.shape[1]:
            zeros = weight.new_zeros(assignment.shape)
            return cls(
                positive, torch.zeros_like(assignment), zeros.unsqueeze(-1).expand(-1, -1, 4), zeros
            )
        index = assignment.clamp(min=0)
        return cls(
            positive,
            objects.labels.gather(1, index),
            objects.boxes.take_along_dim(index.unsqueeze(-1), dim=1),
            weight.gather(1, index),
        )


class SetLosses(NamedTuple):
    """Sums of every problem (R,), to be divided by the number of objects."""

    class_: Tensor
    l1: Tensor
    giou: Tensor


@torch.no_grad()
def match(
    logits: Tensor,
    boxes: Tensor,
    objects: Objects,
    weight: Tensor,
    costs: TermWeights,
    valid: Tensor | None = None,
) -> Learned:
    """One prediction for every object: Hungarian matching.

    Args:
        logits: (R, P, C).
        boxes: (R, P, 4).
        objects: of each problem.
        weight: (R, M), see `area_weight`.
        costs: how much each term of the cost counts.
        valid: (R, P) bool, False for padding; None for none.
    """
    cost = bounded_costs(matching_costs(logits, boxes, objects, weight, costs))
    if valid is not None:
        cost = cost.masked_fill(~valid.unsqueeze(1), WORST_COST)
    assignment = assign_one_to_one(cost, objects.mask)
    if valid is not None:  # more objects than predictions
        assignment = assignment.masked_fill(~valid, -1)
    return Learned.from_assignment(assignment, objects, weight)


def matching_costs(
    logits: Tensor, boxes: Tensor, objects: Objects, weight: Tensor, costs: TermWeights
) -> Tensor:
    """Cost of every prediction for every object, (R, M, P); arguments are those of `match`.

    The weight of an object multiplies its whole cost, so that small objects choose first.
    """
    classes = class_cost(logits.unsqueeze(0), objects.labels, focal=True)[0]
    distance = torch.cdist(objects.boxes, boxes, p=1.0)
    _, giou = pairwise_overlaps(
        box_cxcywh_to_xyxy(objects.boxes), box_cxcywh_to_xyxy(boxes), "giou"
    )
    cost = costs.class_ * classes + costs.l1 * distance - costs.giou * giou
    return weight.unsqueeze(-1) * cost


def detection_losses(
    logits: Tensor, boxes: Tensor, learned: Learned, valid: Tensor, *, weighting: bool = True
) -> SetLosses:
    """Losses of decoders and of the query initializer.

    Args:
        logits: (R, P, C).
        boxes: (R, P, 4).
        learned: by each prediction.
        valid: (R, P) bool, False for padding.
        weighting: Query Weighting; False weighs every matched query like a perfect one.
    """
    score = logits.sigmoid().gather(-1, learned.labels.unsqueeze(-1)).squeeze(-1)
    iou, giou = _overlaps(boxes, learned)
    positive, negative = _query_weights(score, iou, weighting=weighting)
    one_hot = F.one_hot(learned.labels, logits.shape[-1]).bool() & learned.positive.unsqueeze(-1)
    each = weighted_class_loss(logits, one_hot, positive, negative, learned.weight)
    class_ = torch.where(valid.unsqueeze(-1), each, 0.0).sum(dim=(1, 2))
    return SetLosses(class_, *_box_losses(boxes, giou, learned, positive))


def anchor_losses(
    logits: Tensor,
    boxes: Tensor,
    objects: Objects,
    weight: Tensor,
    costs: TermWeights,
    *,
    weighting: bool = True,
) -> SetLosses:
    """Losses of anchors on patches, without regard to classes.

    Args:
        logits: (R, P) of the location score.
        boxes: (R, P, 4).
        objects: of each patch; labels do not matter.
        weight: (R, M), see `area_weight`.
        costs: see `match`.
        weighting: Query Weighting of the box losses.
    """
    alike = objects._replace(labels=torch.zeros_like(objects.labels))
    learned = match(logits.unsqueeze(-1), boxes, alike, weight, costs)
    iou, giou = _overlaps(boxes, learned)
    positive, _ = _query_weights(logits.sigmoid(), iou, weighting=weighting)
    fits = _fits(boxes, objects)
    each = quality_focal_loss(logits, iou, learned.positive, fits, learned.weight)
    return SetLosses(each.sum(dim=1), *_box_losses(boxes, giou, learned, positive))


@torch.no_grad()
def _fits(boxes: Tensor, objects: Objects) -> Tensor:
    """Predictions that fit some object well, (R, P) bool."""
    if not objects.mask.shape[1]:
        return torch.zeros(boxes.shape[:2], dtype=torch.bool, device=boxes.device)
    iou, _ = pairwise_overlaps(box_cxcywh_to_xyxy(objects.boxes), box_cxcywh_to_xyxy(boxes), "iou")
    best: Tensor = iou.masked_fill(~objects.mask.unsqueeze(-1), 0.0).amax(dim=1)
    return best >= _GOOD


def _query_weights(score: Tensor, iou: Tensor, *, weighting: bool) -> tuple[Tensor, Tensor]:
    if not weighting:
        return torch.ones_like(score), torch.zeros_like(score)
    return query_weights(score, iou)


def _overlaps(boxes: Tensor, learned: Learned) -> tuple[Tensor, Tensor]:
    """IoU and generalised IoU of each prediction with its object, (R, P); 1 for background."""
    keep = learned.positive.unsqueeze(-1)
    # Replaced, not multiplied by zero: what is not finite must not reach the gradient.
    pair = (torch.where(keep, b, 0.5) for b in (boxes, learned.boxes.to(boxes.dtype)))
    own, wanted = (box_cxcywh_to_xyxy(b).unsqueeze(-2) for b in pair)
    iou, giou = pairwise_overlaps(own, wanted, "giou")
    return iou.flatten(1), giou.flatten(1)


def _box_losses(
    boxes: Tensor, giou: Tensor, learned: Learned, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """L1 and generalised IoU loss of matched predictions, weighted, (R,) each."""
    factor = torch.where(learned.positive, weight * learned.weight, 0.0)
    difference = torch.where(learned.positive.unsqueeze(-1), boxes - learned.boxes, 0.0)
    return (difference.abs().sum(dim=-1) * factor).sum(dim=1), ((1 - giou) * factor).sum(dim=1)
