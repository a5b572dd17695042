"""Matching costs of every ground truth with every proposal (Sparse R-CNN section 3.4, equation 1).

Letters: ``Q`` prediction sets, ``B`` images, ``P`` proposals, ``M`` ground truths, ``C`` classes.
Ground truths are rows, proposals columns: ground truths supply, proposals demand.
"""

from typing import NamedTuple

import torch
from detectron2.config import CfgNode
from torch import Tensor

from ...structures import Predictions, Targets, TermWeights, at_least_float32, pairwise_overlaps

__all__ = ["WORST_COST", "CostSettings", "bounded_costs", "class_cost", "pairwise_costs"]

# Costs that are not finite (a diverging model), and costs beyond it, rank behind every real cost.
# Small enough that float32 still resolves hundredths beside it, as potentials of transport must.
WORST_COST = 1e4


class CostSettings(NamedTuple):
    """How costs are computed.

    Attributes:
        weights: of the class, L1 and overlap term.
        focal: focal classification; False for softmax.
        alpha: focal balance.
        gamma: focal exponent.
        overlap: of `pairwise_overlaps`, generalised IoU in Sparse R-CNN.
    """

    weights: TermWeights = TermWeights()
    focal: bool = True
    alpha: float = 0.25
    gamma: float = 2.0
    overlap: str = "giou"

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "CostSettings":
        """Read `MODEL.SparseRCNN`: DLA has weights of its own, else the loss weights count."""
        node = cfg.MODEL.SparseRCNN
        weights = TermWeights(node.CLASS_WEIGHT, node.L1_WEIGHT, node.GIOU_WEIGHT)
        if node.DLA.ENABLED:
            weights = TermWeights(node.DLA.CLASS_COST, node.DLA.L1_COST, node.DLA.GIOU_COST)
        return cls(weights, node.USE_FOCAL, node.ALPHA, node.GAMMA, node.OVERLAP.COST)


def class_cost(
    logits: Tensor, labels: Tensor, *, focal: bool, alpha: float = 0.25, gamma: float = 2.0
) -> Tensor:
    """Cost of predicting each ground truth's class.

    With focal classification it is the focal loss of the class as a positive minus the focal loss
    as a negative; all other classes cancel. With softmax it is minus the probability.

    Args:
        logits: (Q, B, P, C), with softmax (Q, B, P, C + 1).
        labels: (B, M) int64.
        focal: which of the two.
        alpha: focal balance.
        gamma: focal exponent.

    Returns:
        (Q, B, M, P).
    """
    index = labels[None, :, None, :].expand(*logits.shape[:3], -1)
    scores = logits if focal else logits.softmax(dim=-1)
    chosen = scores.gather(-1, index).mT.contiguous()  # gathered first: M columns instead of C
    if not focal:
        return -chosen
    probability = chosen.sigmoid()
    positive = alpha * (1 - probability) ** gamma * -(probability + 1e-8).log()
    negative = (1 - alpha) * probability**gamma * -(1 - probability + 1e-8).log()
    return positive - negative


@torch.no_grad()
def pairwise_costs(
    predictions: Predictions, targets: Targets, settings: CostSettings
) -> tuple[Tensor, Tensor]:
    """Weighted sum of class, L1 and overlap cost, in float32 (float64 stays).

    Boxes are compared by L1 after division by the image size, by their overlap in pixels. Seen as
    transport with focal classification, this is the cost of a ground truth minus the cost of
    background for the same proposal: the classes that are not the ground truth's cancel (arXiv
    2205.02101 section 3.1). With softmax, which the paper does not treat, background simply costs
    nothing.

    Returns:
        Costs and IoUs, both (Q, B, M, P); entries of padded ground truths have no meaning.
    """
    sets, images = predictions.boxes.shape[:2]
    logits, boxes = (at_least_float32(x) for x in predictions[:2])
    sizes = targets.sizes.to(boxes.dtype).unsqueeze(1)
    wanted = targets.boxes.to(boxes.dtype)
    rows = wanted.expand(sets, images, -1, -1)
    l1 = torch.cdist((wanted / sizes).expand_as(rows), boxes / sizes, p=1.0)
    iou, overlap = pairwise_overlaps(rows, boxes, settings.overlap)
    weights = settings.weights
    classes = class_cost(
        logits, targets.labels, focal=settings.focal, alpha=settings.alpha, gamma=settings.gamma
    )
    return weights.class_ * classes + weights.l1 * l1 - weights.giou * overlap, iou


def bounded_costs(cost: Tensor) -> Tensor:
    """Costs of any shape, finite: what is no number, or beyond `WORST_COST`, is as bad as it."""
    return cost.nan_to_num(nan=WORST_COST).clamp(-WORST_COST, WORST_COST)
