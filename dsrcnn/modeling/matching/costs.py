"""Matching costs of every ground truth with every proposal (Sparse R-CNN section 3.4, equation 1).

Ground truths are rows and proposals columns: ground truths supply, proposals demand.
"""

from typing import NamedTuple

import torch
from detectron2.config import CfgNode
from torch import Tensor

from ...structures import (
    Predictions,
    Targets,
    TermWeights,
    at_least_float32,
    box_xyxy_to_cxcywh,
    pairwise_overlaps,
)

# Bound of all costs, also used for NaN: above any cost of a healthy model, and small enough that
# float32 resolves hundredths beside it, which the potentials of the transport need.
WORST_COST = 1e4


class CostSettings(NamedTuple):
    """Settings of `pairwise_costs`.

    Attributes:
        weights: of the class, L1 and overlap term.
        focal: focal classification; False for softmax.
        alpha: focal balance.
        gamma: focal exponent.
        overlap: see `pairwise_overlaps`; GIoU in Sparse R-CNN.
        class_target: "label" or "iou", as in `SetCriterion`.
        l1_of_centers: whether L1 compares centers and sizes, as DETR does, instead of corners.
    """

    weights: TermWeights = TermWeights()
    focal: bool = True
    alpha: float = 0.25
    gamma: float = 2.0
    overlap: str = "giou"
    class_target: str = "label"
    l1_of_centers: bool = False

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "CostSettings":
        """Read `MODEL.SparseRCNN`; without DLA the weights are those of the losses."""
        node = cfg.MODEL.SparseRCNN
        weights = TermWeights(node.CLASS_WEIGHT, node.L1_WEIGHT, node.GIOU_WEIGHT)
        if node.DLA.ENABLED:
            weights = TermWeights(node.DLA.CLASS_COST, node.DLA.L1_COST, node.DLA.GIOU_COST)
        focal = (node.USE_FOCAL, node.ALPHA, node.GAMMA)
        return cls(weights, *focal, node.OVERLAP)


def class_cost(
    logits: Tensor,
    labels: Tensor,
    *,
    focal: bool,
    alpha: float = 0.25,
    gamma: float = 2.0,
    quality: Tensor | None = None,
) -> Tensor:
    """Cost of the class of each ground truth.

    With focal classification it is the focal loss of the class as a positive minus the focal loss
    as a negative; all other classes cancel. With softmax it is the negative probability.

    Args:
        logits: (Q, B, P, C), with softmax (Q, B, P, C + 1).
        labels: (B, M) int64.
        focal: focal classification; False for softmax.
        alpha: focal balance.
        gamma: focal exponent.
        quality: (Q, B, M, P) in [0, 1], what the score of a positive learns, see
            `quality_focal_losses`; None for 1.

    Returns:
        (Q, B, M, P).
    """
    index = labels[None, :, None, :].expand(*logits.shape[:3], -1)
    scores = logits if focal else logits.softmax(dim=-1)
    selected = scores.gather(-1, index).mT.contiguous()  # gathered first: M columns instead of C
    if not focal:
        return -selected
    probability = selected.sigmoid()
    as_object, as_background = -(probability + 1e-8).log(), -(1 - probability + 1e-8).log()
    negative = (1 - alpha) * probability**gamma * as_background
    if quality is None:
        return alpha * (1 - probability) ** gamma * as_object - negative
    entropy = quality * as_object + (1 - quality) * as_background
    return alpha * (quality - probability).abs() ** gamma * entropy - negative


@torch.no_grad()
def pairwise_costs(
    predictions: Predictions, targets: Targets, settings: CostSettings
) -> tuple[Tensor, Tensor]:
    """Weighted sum of class, L1 and overlap cost, in float32 (float64 stays).

    L1 compares boxes divided by the image size. As a transport cost with focal classification, this
    is the cost of a ground truth minus the cost of background for the same proposal: all other
    classes cancel (arXiv 2205.02101 section 3.1). With softmax, which the paper does not treat,
    background has no cost.

    Returns:
        Costs and IoUs, both (Q, B, M, P); entries of padded ground truths have no meaning.
    """
    sets, images = predictions.boxes.shape[:2]
    logits, boxes = (at_least_float32(x) for x in predictions[:2])
    sizes = targets.sizes.to(boxes.dtype).unsqueeze(1)
    target_boxes = targets.boxes.to(boxes.dtype)
    rows = target_boxes.expand(sets, images, -1, -1)
    scaled = (target_boxes / sizes).expand_as(rows), boxes / sizes
    if settings.l1_of_centers:
        scaled = box_xyxy_to_cxcywh(scaled[0]), box_xyxy_to_cxcywh(scaled[1])
    l1 = torch.cdist(*scaled, p=1.0)
    iou, overlap = pairwise_overlaps(rows, boxes, settings.overlap)
    weights = settings.weights
    classes = class_cost(
        logits,
        targets.labels,
        focal=settings.focal,
        alpha=settings.alpha,
        gamma=settings.gamma,
        quality=iou if settings.class_target == "iou" else None,
    )
    return weights.class_ * classes + weights.l1 * l1 - weights.giou * overlap, iou


def bounded_costs(cost: Tensor) -> Tensor:
    """Clamp costs of any shape to `WORST_COST`, which also replaces NaN."""
    return cost.nan_to_num(nan=WORST_COST).clamp(-WORST_COST, WORST_COST)
