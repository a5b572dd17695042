"""All losses of ASAG (section 3.5): of anchors, of the query initializer, of the decoders.

Letters: ``B`` images, ``N`` anchors, ``K`` decoders, ``S`` prediction sets, ``C`` classes, ``M``
objects (padded).
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from ...structures import (
    Predictions,
    Targets,
    TermWeights,
    box_cxcywh_to_xyxy,
    box_xyxy_to_cxcywh,
    pairwise_overlaps,
)
from ...utils.distributed import mean_over_processes
from ..matching import assign_one_to_one
from ..matching.costs import WORST_COST, bounded_costs, class_cost
from .patches import (
    FixedLevels,
    Objects,
    ProbedLevel,
    objects_in_patches,
    objects_in_quarters,
    objects_of_flips,
)

__all__ = [
    "ASAGCounts",
    "ASAGCriterion",
    "Learned",
    "SetLosses",
    "anchor_losses",
    "area_weight",
    "detection_losses",
    "match",
    "matching_costs",
    "objects_of",
    "quality_focal_loss",
    "query_weights",
    "weighted_class_loss",
]

_GAMMA = (0.4, 0.6)  # exponents of score and IoU
_AT_LEAST = 1 / (1 + math.exp(1.5))  # sigmoid(-1.5), before it is normalized
_AT_MOST = 1 / (1 + math.exp(-3.0))  # sigmoid(3)


def query_weights(scores: Tensor, ious: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of being an object and of being none, for queries that are matched with one.

    A query that is sure of its object and fits it teaches what the object is; one that is sure but
    does not fit is taught to be less so.

    Args:
        scores: (...) of the matched class.
        ious: (...) with the matched box.

    Returns:
        Two tensors (...): from 0.19 to 1, and from 0 to 0.81.
    """
    sure = scores.detach().clamp(0, 1) ** _GAMMA[0]
    fitting = ious.detach().clamp(0, 1) ** _GAMMA[1]
    unfit = torch.where(fitting < 0.5, torch.ones_like(fitting), (1 - fitting**2) / 0.75)
    return _normalized(sure * fitting), _normalized(sure * unfit) - _AT_LEAST / _AT_MOST


def _normalized(x: Tensor) -> Tensor:
    return ((x - 1 / 3) * 4.5).sigmoid() / _AT_MOST


def area_weight(sizes: Tensor, most: float = 4.0, *, inverse: bool = False) -> Tensor:
    """From 1, for objects as large as the image, to `most`, for small ones; (..., 2) to (...).

    Args:
        sizes: width and height as shares of the image, or of the patch.
        most: the largest weight.
        inverse: large objects have it instead.
    """
    side = sizes.detach().clamp(min=0).prod(dim=-1).sqrt()
    return 1 + (most - 1) * side if inverse else most - (most - 1) * side


def weighted_class_loss(
    logits: Tensor, matched: Tensor, positive: Tensor, negative: Tensor, weight: Tensor
) -> Tensor:
    """Class loss of every query and class, not reduced.

    Of a class that is not matched the cross-entropy with 0 times the squared score; of the matched
    one both cross-entropies by their weights.

    Args:
        logits: (..., C).
        matched: (..., C) bool, the class of each query's object; nowhere for background.
        positive: (...) first of `query_weights`.
        negative: (...) second of them.
        weight: (...) of the object.

    Returns:
        (..., C).
    """
    zeros, ones = torch.zeros_like(logits), torch.ones_like(logits)
    to_none = F.binary_cross_entropy_with_logits(logits, zeros, reduction="none")
    to_object = F.binary_cross_entropy_with_logits(logits, ones, reduction="none")
    both = positive.unsqueeze(-1) * to_object + negative.unsqueeze(-1) * to_none
    background = logits.sigmoid() ** 2 * to_none
    return torch.where(matched, weight.unsqueeze(-1) * both, background)


def quality_focal_loss(
    logits: Tensor, quality: Tensor, matched: Tensor, ignored: Tensor, weight: Tensor
) -> Tensor:
    """Loss of location scores that should be the IoU (arXiv 2006.04388, beta 2), not reduced.

    Args:
        logits: (...).
        quality: (...) IoU with the matched box; any number elsewhere.
        matched: (...) bool.
        ignored: (...) bool, fitting an object that another one is matched with: no loss.
        weight: (...) of the object.

    Returns:
        (...); the factor's gradient is part of it.
    """
    target = torch.where(matched, quality, torch.zeros_like(quality)).detach()
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    factor = (target - logits.sigmoid()) ** 2
    factor = torch.where(matched, weight * factor, factor)
    return (factor * entropy).masked_fill(ignored & ~matched, 0.0)


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


_FIXED_PATCHES = 4  # of P5, and of P6 with its flips: what the probed ones together count as


class ASAGCounts(NamedTuple):
    """What losses are divided by.

    Attributes:
        objects: (), mean over processes, at least 1.
        images: () of this process.
    """

    objects: Tensor
    images: Tensor


def objects_of(targets: Targets) -> Objects:
    """Ground truth with boxes cxcywh as shares of the image."""
    boxes = box_xyxy_to_cxcywh(targets.boxes) / targets.sizes.unsqueeze(1)
    return Objects(boxes, targets.labels, targets.mask)


class ASAGCriterion(nn.Module):
    """Every set of predictions is matched by itself, one prediction for an object."""

    @configurable
    def __init__(
        self,
        *,
        cells: int = 15,
        weights: TermWeights,
        anchor_weights: TermWeights,
        small_object_weight: float = 4.0,
        query_weighting: bool = True,
        flip_as_corners: bool = False,
    ) -> None:
        """Set the losses.

        Args:
            cells: per side of a patch.
            weights: factors of the losses of initializer and decoders, and of all matching costs.
            anchor_weights: factors of the losses of anchors.
            small_object_weight: see `area_weight`; 1 weighs all objects the same.
            query_weighting: see `query_weights`.
            flip_as_corners: see `objects_of_flips`.
        """
        super().__init__()
        self.cells = cells
        self.weights = weights
        self.anchor_weights = anchor_weights
        self.small_object_weight = small_object_weight
        self.query_weighting = query_weighting
        self.flip_as_corners = flip_as_corners

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read `MODEL.ASAG`, and the weights of `MODEL.SparseRCNN`."""
        node, own = cfg.MODEL.SparseRCNN, cfg.MODEL.ASAG
        anchors = own.ANCHORS
        return {
            "cells": anchors.CELLS,
            "weights": TermWeights(node.CLASS_WEIGHT, node.L1_WEIGHT, node.GIOU_WEIGHT),
            "anchor_weights": TermWeights(
                anchors.CLASS_WEIGHT, anchors.L1_WEIGHT, anchors.GIOU_WEIGHT
            ),
            "small_object_weight": own.SMALL_OBJECT_WEIGHT,
            "query_weighting": own.QUERY_WEIGHTING,
            "flip_as_corners": own.OFFICIAL_QUIRKS,
        }

    def count(self, targets: Targets) -> ASAGCounts:
        """What a part of a batch adds to the divisors."""
        objects = targets.mask.sum().to(targets.sizes.dtype)
        return ASAGCounts(objects, torch.full_like(objects, len(targets.mask)))

    def normalizers(self, parts: list[ASAGCounts]) -> ASAGCounts:
        """Divisors for a batch that was counted in parts."""
        objects, images = (torch.stack(x).sum() for x in zip(*parts, strict=True))
        return ASAGCounts(mean_over_processes(objects).clamp(min=1), images)

    def of_anchors(
        self, fixed: FixedLevels, probed: list[ProbedLevel], targets: Targets, counts: ASAGCounts
    ) -> dict[str, Tensor]:
        """Losses of anchors on their patches.

        Args:
            fixed: predictions of P5 and P6.
            probed: of P4 and P3.
            targets: ground truth.
            counts: see `normalizers`.

        Returns:
            ``loss_ce_anchor``, ``loss_bbox_anchor``, ``loss_giou_anchor``, weighted.
        """
        objects = objects_of(targets)
        flips = objects_of_flips(objects, as_corners=self.flip_as_corners)
        if fixed.whole.shape[1] == 1:  # without flips, as in evaluation
            flips = Objects(*(x[::_FIXED_PATCHES] for x in flips))
        sums = [
            self._anchor_sums(fixed.whole.flatten(0, 1), flips, inverse=True),
            self._anchor_sums(fixed.quarters.flatten(0, 1), objects_in_quarters(objects)),
        ]
        if probed:
            wanted = [
                objects_in_patches(
                    objects, targets.sizes, x.images, x.positions, x.stride, self.cells
                )
                for x in probed
            ]
            together = Objects(*(torch.cat(x) for x in zip(*wanted, strict=True)))
            found = torch.cat([x.predictions for x in probed])
            sums.append(self._anchor_sums(found, together) * (_FIXED_PATCHES / max(len(found), 1)))
        total = torch.stack(sums).sum(dim=0) / counts.objects
        return _named(total, self.anchor_weights, "loss", "_anchor")

    def _anchor_sums(self, found: Tensor, objects: Objects, *, inverse: bool = False) -> Tensor:
        """Class, L1 and overlap loss of patches (R, A, 5), summed: (3,)."""
        weight = self._object_weight(objects, inverse=inverse)
        weighting = self.query_weighting
        losses = anchor_losses(
            found[..., 4], found[..., :4], objects, weight, self.weights, weighting=weighting
        )
        return torch.stack([x.sum() for x in losses])

    def _object_weight(self, objects: Objects, *, inverse: bool = False) -> Tensor:
        return area_weight(objects.boxes[..., 2:], self.small_object_weight, inverse=inverse)

    def of_detections(
        self, predictions: Predictions, mask: Tensor, targets: Targets, counts: ASAGCounts
    ) -> dict[str, Tensor]:
        """Losses of the query initializer, which is the first prediction set, and the decoders.

        Args:
            predictions: (1 + K, B, N, ...).
            mask: (B, N) bool, False for padding.
            targets: ground truth.
            counts: see `normalizers`.

        Returns:
            ``loss_ce_rpn`` and so on of the initializer, ``loss_ce`` of the last decoder and
            ``loss_ce_k`` of decoder k before it, weighted.
        """
        sets = len(predictions.logits)
        objects = _repeated(objects_of(targets), sets)
        logits, boxes = self._flat(predictions, targets)
        weight, valid = self._object_weight(objects), mask.repeat(sets, 1)
        learned = match(logits, boxes, objects, weight, self.weights, valid)
        sums = self._detection_sums(logits, boxes, learned, valid, sets) / counts.objects
        names = ["_rpn", *(f"_{k}" for k in range(sets - 2)), ""]
        losses = {}
        for values, suffix in zip(sums, names, strict=True):
            losses.update(_named(values, self.weights, "loss", suffix))
        return losses

    def of_denoising(
        self, predictions: Predictions, assignment: Tensor, targets: Targets, counts: ASAGCounts
    ) -> dict[str, Tensor]:
        """Losses of denoising queries, which are not matched: each has its object.

        Args:
            predictions: (1 + K, B, n, ...), of the initializer first.
            assignment: (B, n) int64, -1 for padding.
            targets: ground truth.
            counts: see `normalizers`.

        Returns:
            ``dn_loss_ce_i`` and so on, weighted; 0 is the initializer.
        """
        sets = len(predictions.logits)
        objects = _repeated(objects_of(targets), sets)
        logits, boxes = self._flat(predictions, targets)
        assigned = assignment.repeat(sets, 1)
        learned = Learned.from_assignment(assigned, objects, self._object_weight(objects))
        sums = self._detection_sums(logits, boxes, learned, assigned >= 0, sets)
        losses = {}
        for index, values in enumerate(sums / (assignment.shape[1] * counts.images)):
            losses.update(_named(values, self.weights, "dn_loss", f"_{index}"))
        return losses

    def _flat(self, predictions: Predictions, targets: Targets) -> tuple[Tensor, Tensor]:
        """Logits (S * B, N, C), and boxes (S * B, N, 4) cxcywh as shares of the image."""
        boxes = box_xyxy_to_cxcywh(predictions.boxes) / targets.sizes.unsqueeze(1)
        return predictions.logits.flatten(0, 1), boxes.flatten(0, 1)

    def _detection_sums(
        self, logits: Tensor, boxes: Tensor, learned: Learned, valid: Tensor, sets: int
    ) -> Tensor:
        """(S, 3): class, L1 and overlap loss of each prediction set, summed over the images."""
        losses: SetLosses = detection_losses(
            logits, boxes, learned, valid, weighting=self.query_weighting
        )
        return torch.stack([x.view(sets, -1).sum(dim=1) for x in losses], dim=1)


def _repeated(objects: Objects, sets: int) -> Objects:
    """The same objects for every prediction set: (S * B, M)."""
    return Objects(*(x.repeat(sets, *(1,) * (x.dim() - 1)) for x in objects))


def _named(sums: Tensor, weights: TermWeights, start: str, suffix: str) -> dict[str, Tensor]:
    names = ("ce", "bbox", "giou")
    pairs = zip(names, weights, sums.unbind(), strict=True)
    return {f"{start}_{name}{suffix}": weight * value for name, weight, value in pairs}
