"""Matching and losses of ASAG (arXiv 2308.09242, section 3.5).

Anchors, the query initializer and every decoder are matched separately, one prediction per ground
truth. Boxes are cxcywh relative to the image or patch.

Notation: ``R`` matching problems, ``P`` predictions of each, ``Q`` prediction sets.
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
from ...utils.distributed import reduce_mean
from ..matching import assign_one_to_one
from ..matching.costs import WORST_COST, bounded_costs, class_cost
from .anchor_generator import FixedLevels, ProbedLevel
from .patches import (
    RelativeTargets,
    targets_in_patches,
    targets_in_quarters,
    targets_of_flips,
)

# As published.
_ANCHOR_WEIGHTS = TermWeights(8.0, 4.0, 2.0)
_PROBED_WEIGHT = 4  # losses of fixed patches are summed, those of probed ones averaged times this
_GOOD_IOU = 0.5  # anchors that overlap a ground truth this much are no background
_EXPONENTS = (0.4, 0.6)  # of score and IoU
_LOWEST, _HIGHEST = 1 / (1 + math.exp(1.5)), 1 / (1 + math.exp(-3.0))  # of `_rescale`, unscaled


def query_weights(scores: Tensor, ious: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of the losses of matched queries as foreground and as background (Query Weighting).

    Confident queries with a good box count as foreground, confident ones with a bad box as
    background.

    Args:
        scores: (...) of the matched class.
        ious: (...) with the matched box.

    Returns:
        Two tensors (...) without gradient: from 0.19 to 1, and from 0 to 0.81.
    """
    score = scores.detach().clamp(0, 1) ** _EXPONENTS[0]
    fit = ious.detach().clamp(0, 1) ** _EXPONENTS[1]
    misfit = torch.where(fit < 0.5, torch.ones_like(fit), (1 - fit**2) / 0.75)
    return _rescale(score * fit), _rescale(score * misfit) - _LOWEST / _HIGHEST


def _rescale(x: Tensor) -> Tensor:
    return ((x - 1 / 3) * 4.5).sigmoid() / _HIGHEST


class MatchedTargets(NamedTuple):
    """Ground truth of every prediction.

    Attributes:
        positive: (R, P) bool, False for background.
        labels: (R, P) int64.
        boxes: (R, P, 4).
        weight: (R, P) of the ground truth.
    """

    positive: Tensor
    labels: Tensor
    boxes: Tensor
    weight: Tensor

    @classmethod
    def from_assignment(
        cls, assignment: Tensor, targets: RelativeTargets, weight: Tensor
    ) -> "MatchedTargets":
        """Gather by an assignment (R, P), -1 for background."""
        positive = assignment >= 0
        if not targets.mask.shape[1]:
            zeros = weight.new_zeros(assignment.shape)
            boxes = zeros.unsqueeze(-1).expand(-1, -1, 4)
            return cls(positive, torch.zeros_like(assignment), boxes, zeros)
        index = assignment.clamp(min=0)
        return cls(
            positive,
            targets.labels.gather(1, index),
            targets.boxes.take_along_dim(index.unsqueeze(-1), dim=1),
            weight.gather(1, index),
        )


@torch.no_grad()
def match(
    logits: Tensor,
    boxes: Tensor,
    targets: RelativeTargets,
    weight: Tensor,
    costs: TermWeights,
    valid: Tensor | None = None,
) -> MatchedTargets:
    """Match one prediction to every ground truth by Hungarian matching.

    Args:
        logits: (R, P, C).
        boxes: (R, P, 4).
        targets: of each problem.
        weight: (R, M) of the ground truths, see `RelativeTargets.area_weight`.
        costs: weights of the terms of the cost.
        valid: (R, P) bool, False for padding; None for none.
    """
    cost = bounded_costs(matching_costs(logits, boxes, targets, weight, costs))
    if valid is not None:
        cost = cost.masked_fill(~valid.unsqueeze(1), WORST_COST)
    assignment = assign_one_to_one(cost, targets.mask)
    if valid is not None:  # more ground truths than predictions
        assignment = assignment.masked_fill(~valid, -1)
    return MatchedTargets.from_assignment(assignment, targets, weight)


def matching_costs(
    logits: Tensor, boxes: Tensor, targets: RelativeTargets, weight: Tensor, costs: TermWeights
) -> Tensor:
    """Compute costs (R, M, P); arguments are those of `match`.

    Unlike the cost of Sparse R-CNN, L1 compares centers and sizes, and the weight of a ground truth
    multiplies all terms, so that small ones choose first.
    """
    classes = class_cost(logits.unsqueeze(0), targets.labels, focal=True)[0]
    l1 = torch.cdist(targets.boxes, boxes, p=1.0)
    _, giou = _pairwise_overlaps(targets.boxes, boxes)
    return weight.unsqueeze(-1) * (costs.class_ * classes + costs.l1 * l1 - costs.giou * giou)


def _pairwise_overlaps(boxes1: Tensor, boxes2: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and GIoU of boxes cxcywh."""
    return pairwise_overlaps(box_cxcywh_to_xyxy(boxes1), box_cxcywh_to_xyxy(boxes2), "giou")


def weighted_class_loss(
    logits: Tensor, one_hot: Tensor, positive: Tensor, negative: Tensor, weight: Tensor
) -> Tensor:
    """Class loss of Query Weighting, not reduced.

    The matched class has the cross-entropies with 1 and with 0, by their weights; all others have
    the cross-entropy with 0 times the squared score.

    Args:
        logits: (..., C).
        one_hot: (..., C) bool, one class of every matched query, none of background.
        positive: (...) weight of the cross-entropy with 1.
        negative: (...) weight of the cross-entropy with 0.
        weight: (...) of the ground truth.

    Returns:
        (..., C).
    """
    zeros, ones = torch.zeros_like(logits), torch.ones_like(logits)
    to_zero = F.binary_cross_entropy_with_logits(logits, zeros, reduction="none")
    to_one = F.binary_cross_entropy_with_logits(logits, ones, reduction="none")
    both = positive.unsqueeze(-1) * to_one + negative.unsqueeze(-1) * to_zero
    background = logits.sigmoid() ** 2 * to_zero
    return torch.where(one_hot, weight.unsqueeze(-1) * both, background)


def quality_focal_loss(
    logits: Tensor, quality: Tensor, positive: Tensor, ignored: Tensor, weight: Tensor
) -> Tensor:
    """Loss of scores that predict an IoU (arXiv 2006.04388, equation 4, beta 2), not reduced.

    Args:
        logits: (...).
        quality: (...) IoU with the matched box; any values for background.
        positive: (...) bool, False for background.
        ignored: (...) bool, has no loss where it is background.
        weight: (...) of the ground truth.

    Returns:
        (...); the modulating factor has a gradient, too.
    """
    target = torch.where(positive, quality, torch.zeros_like(quality)).detach()
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    factor = (target - logits.sigmoid()) ** 2
    factor = torch.where(positive, weight * factor, factor)
    return (factor * entropy).masked_fill(ignored & ~positive, 0.0)


def detection_losses(
    logits: Tensor, boxes: Tensor, matched: MatchedTargets, valid: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Class, L1 and GIoU loss of the query initializer and of decoders.

    Args:
        logits: (R, P, C).
        boxes: (R, P, 4).
        matched: ground truth of each prediction.
        valid: (R, P) bool, False for padding.

    Returns:
        (R,) each, sums over the predictions.
    """
    scores = logits.sigmoid().gather(-1, matched.labels.unsqueeze(-1)).squeeze(-1)
    iou, giou = matched_overlaps(boxes, matched)
    positive, negative = query_weights(scores, iou)
    one_hot = F.one_hot(matched.labels, logits.shape[-1]).bool() & matched.positive.unsqueeze(-1)
    losses = weighted_class_loss(logits, one_hot, positive, negative, matched.weight)
    class_ = torch.where(valid.unsqueeze(-1), losses, 0.0).sum(dim=(1, 2))
    return class_, *weighted_box_losses(boxes, giou, matched, positive)


def location_losses(
    logits: Tensor, boxes: Tensor, targets: RelativeTargets, weight: Tensor, costs: TermWeights
) -> tuple[Tensor, Tensor, Tensor]:
    """Location score, L1 and GIoU loss (R,) of anchors on patches, without classes.

    Arguments are those of `match`, but the scores `logits` are (R, P).
    """
    agnostic = targets._replace(labels=torch.zeros_like(targets.labels))
    matched = match(logits.unsqueeze(-1), boxes, agnostic, weight, costs)
    iou, giou = matched_overlaps(boxes, matched)
    positive, _ = query_weights(logits.sigmoid(), iou)
    ignored = _has_good_iou(boxes, targets)
    losses = quality_focal_loss(logits, iou, matched.positive, ignored, matched.weight)
    return losses.sum(dim=1), *weighted_box_losses(boxes, giou, matched, positive)


@torch.no_grad()
def _has_good_iou(boxes: Tensor, targets: RelativeTargets) -> Tensor:
    """Whether predictions overlap any ground truth well, (R, P) bool."""
    if not targets.mask.shape[1]:
        return torch.zeros(boxes.shape[:2], dtype=torch.bool, device=boxes.device)
    iou, _ = _pairwise_overlaps(targets.boxes, boxes)
    best: Tensor = iou.masked_fill(~targets.mask.unsqueeze(-1), 0.0).amax(dim=1)
    return best >= _GOOD_IOU


def matched_overlaps(boxes: Tensor, matched: MatchedTargets) -> tuple[Tensor, Tensor]:
    """IoU and GIoU (R, P) of predictions (R, P, 4) and their ground truths; 1 for background."""
    keep = matched.positive.unsqueeze(-1)
    # Replaced, not multiplied by zero: values that are not finite must not reach the gradient.
    pair = (torch.where(keep, b, 0.5).unsqueeze(-2) for b in (boxes, matched.boxes.to(boxes.dtype)))
    iou, giou = _pairwise_overlaps(*pair)
    return iou.flatten(1), giou.flatten(1)


def weighted_box_losses(
    boxes: Tensor, giou: Tensor, matched: MatchedTargets, positive: Tensor
) -> tuple[Tensor, Tensor]:
    """L1 and GIoU loss (R,) of matched predictions, times `positive` (R, P) and the area weight."""
    factor = torch.where(matched.positive, positive * matched.weight, 0.0)
    difference = torch.where(matched.positive.unsqueeze(-1), boxes - matched.boxes, 0.0)
    return (difference.abs().sum(dim=-1) * factor).sum(dim=1), ((1 - giou) * factor).sum(dim=1)


class ASAGNormalizers(NamedTuple):
    """Divisors of the losses.

    Attributes:
        num_targets: () ground truths, mean over processes, at least 1.
        num_images: () of this process.
    """

    num_targets: Tensor
    num_images: Tensor


class ASAGCriterion(nn.Module):
    """Losses of anchors, of the query initializer and of all decoders."""

    @configurable
    def __init__(self, *, weights: TermWeights) -> None:
        """Set the weights of the losses of initializer and decoders, and of all matching costs."""
        super().__init__()
        self.weights = weights

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read the weights of `MODEL.SparseRCNN`."""
        node = cfg.MODEL.SparseRCNN
        return {"weights": TermWeights(node.CLASS_WEIGHT, node.L1_WEIGHT, node.GIOU_WEIGHT)}

    def count(self, targets: Targets) -> ASAGNormalizers:
        """Count what a part of a batch adds to the sums in `normalizers`: no divisors yet."""
        number = targets.mask.sum().to(targets.sizes.dtype)
        return ASAGNormalizers(number, torch.full_like(number, len(targets.mask)))

    def normalizers(self, counts: list[ASAGNormalizers]) -> ASAGNormalizers:
        """Sum the counts of all parts of a batch, and average ground truths over processes."""
        targets, images = (torch.stack(x).sum() for x in zip(*counts, strict=True))
        return ASAGNormalizers(reduce_mean(targets).clamp(min=1), images)

    def of_anchors(
        self,
        fixed: FixedLevels,
        probed: list[ProbedLevel],
        targets: Targets,
        normalizers: ASAGNormalizers,
    ) -> dict[str, Tensor]:
        """Compute the losses of anchors on their patches.

        Returns:
            Weighted ``loss_ce_anchor``, ``loss_bbox_anchor`` and ``loss_giou_anchor``.
        """
        relative = RelativeTargets.from_targets(targets)
        has_flips = fixed.whole.shape[1] > 1
        whole = targets_of_flips(relative) if has_flips else relative
        sums = [
            self._patch_sums(fixed.whole.flatten(0, 1), whole, inverse=True),
            self._patch_sums(fixed.quarters.flatten(0, 1), targets_in_quarters(relative)),
        ]
        if probed:
            parts = [
                targets_in_patches(relative, targets.sizes, x.images, x.positions, x.stride)
                for x in probed
            ]
            inside = RelativeTargets(*(torch.cat(x) for x in zip(*parts, strict=True)))
            predictions = torch.cat([x.predictions for x in probed])
            part = len(targets.mask) / normalizers.num_images  # 1, or less with accumulation
            factor = _PROBED_WEIGHT * part / len(predictions)
            sums.append(self._patch_sums(predictions, inside) * factor)
        total = torch.stack(sums).sum(dim=0) / normalizers.num_targets
        return _name(total, _ANCHOR_WEIGHTS, "loss", "_anchor")

    def _patch_sums(
        self, predictions: Tensor, targets: RelativeTargets, *, inverse: bool = False
    ) -> Tensor:
        """Location score, L1 and GIoU loss of patches (R, A, 5), summed: (3,)."""
        logits, boxes = predictions[..., 4], predictions[..., :4]
        weight = targets.area_weight(inverse=inverse)
        losses = location_losses(logits, boxes, targets, weight, self.weights)
        return torch.stack([x.sum() for x in losses])

    def of_detections(
        self, predictions: Predictions, mask: Tensor, targets: Targets, normalizers: ASAGNormalizers
    ) -> dict[str, Tensor]:
        """Compute the losses of the query initializer, the first set, and of the decoders.

        Args:
            predictions: (1 + decoders, B, N, .).
            mask: (B, N) bool, False for padding.
            targets: ground truth of the batch.
            normalizers: divisors.

        Returns:
            Weighted ``loss_ce_rpn`` and so on of the initializer, ``loss_ce`` of the last decoder,
            ``loss_ce_k`` of decoder k before it.
        """
        sets = len(predictions.logits)
        logits, boxes, repeated, weight = self._problems(predictions, targets)
        valid = mask.repeat(sets, 1)
        matched = match(logits, boxes, repeated, weight, self.weights, valid)
        losses = detection_losses(logits, boxes, matched, valid)
        suffixes = ["_rpn", *(f"_{k}" for k in range(sets - 2)), ""]
        return _name_sets(losses, normalizers.num_targets, self.weights, "loss", suffixes)

    def of_denoising(
        self,
        predictions: Predictions,
        assignment: Tensor,
        targets: Targets,
        normalizers: ASAGNormalizers,
    ) -> dict[str, Tensor]:
        """Compute the losses of denoising queries, which reconstruct a given ground truth.

        Arguments are those of `of_detections`, with an assignment (B, n), -1 for padding.

        Returns:
            Weighted ``dn_loss_ce_i`` and so on; 0 is the initializer, k + 1 decoder k.
        """
        sets = len(predictions.logits)
        logits, boxes, repeated, weight = self._problems(predictions, targets)
        assigned = assignment.repeat(sets, 1)
        matched = MatchedTargets.from_assignment(assigned, repeated, weight)
        losses = detection_losses(logits, boxes, matched, assigned >= 0)
        divisor = assignment.shape[1] * normalizers.num_images  # with padding
        suffixes = [f"_{index}" for index in range(sets)]
        return _name_sets(losses, divisor, self.weights, "dn_loss", suffixes)

    def _problems(
        self, predictions: Predictions, targets: Targets
    ) -> tuple[Tensor, Tensor, RelativeTargets, Tensor]:
        """Flatten sets and images: logits, relative boxes, ground truths and their weights."""
        sets, relative = len(predictions.logits), RelativeTargets.from_targets(targets)
        repeated = RelativeTargets(*(x.repeat(sets, *(1,) * (x.dim() - 1)) for x in relative))
        boxes = box_xyxy_to_cxcywh(predictions.boxes) / targets.sizes.unsqueeze(1)
        logits, boxes = predictions.logits.flatten(0, 1), boxes.flatten(0, 1)
        return logits, boxes, repeated, repeated.area_weight()


def _name_sets(
    losses: tuple[Tensor, ...], divisor: Tensor, weights: TermWeights, prefix: str, names: list[str]
) -> dict[str, Tensor]:
    """Sum losses (Q * B,) over images, and name the sums of each set by its suffix in `names`."""
    sums = torch.stack([x.view(len(names), -1).sum(dim=1) for x in losses], dim=1) / divisor
    named = [_name(row, weights, prefix, name) for row, name in zip(sums, names, strict=True)]
    return {key: value for terms in named for key, value in terms.items()}


def _name(sums: Tensor, weights: TermWeights, prefix: str, suffix: str) -> dict[str, Tensor]:
    names = ("ce", "bbox", "giou")
    terms = zip(names, weights, sums.unbind(), strict=True)
    return {f"{prefix}_{name}{suffix}": weight * value for name, weight, value in terms}
