"""Matching costs of every proposal with every ground truth (Sparse R-CNN section 3.4, equation 1).

Letters: ``Q`` prediction sets, ``B`` images, ``P`` proposals, ``M`` ground truths, ``C`` classes.
"""

import torch
from torch import Tensor

from ...structures import Predictions, Targets, TermWeights, pairwise_iou_giou

__all__ = ["class_cost", "pairwise_costs"]


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
        (Q, B, P, M).
    """
    index = labels[None, :, None, :].expand(*logits.shape[:3], -1)
    if not focal:
        return -logits.softmax(dim=-1).gather(-1, index)
    probability = logits.gather(-1, index).sigmoid()  # gathered first: M columns instead of C
    positive = alpha * (1 - probability) ** gamma * -(probability + 1e-8).log()
    negative = (1 - alpha) * probability**gamma * -(1 - probability + 1e-8).log()
    return positive - negative


@torch.no_grad()
def pairwise_costs(
    predictions: Predictions,
    targets: Targets,
    weights: TermWeights,
    *,
    focal: bool,
    alpha: float = 0.25,
    gamma: float = 2.0,
) -> Tensor:
    """Weighted sum of class, L1 and generalised IoU cost, in float32 (float64 stays).

    Boxes are compared by L1 after division by the image size, by GIoU in pixels.

    Returns:
        (Q, B, P, M); entries of padded ground truths have no meaning.
    """
    sets, images = predictions.boxes.shape[:2]
    dtype = torch.promote_types(predictions.boxes.dtype, torch.float32)
    boxes, ground_truths = predictions.boxes.to(dtype), targets.boxes.to(dtype)
    sizes = targets.sizes.to(dtype).unsqueeze(1)
    relative, wanted = boxes / sizes, ground_truths / sizes
    l1 = torch.cdist(relative, wanted.expand(sets, images, -1, -1), p=1.0)
    _, giou = pairwise_iou_giou(boxes, ground_truths.expand(sets, images, -1, -1))
    classes = class_cost(
        predictions.logits.to(dtype), targets.labels, focal=focal, alpha=alpha, gamma=gamma
    )
    return weights.class_ * classes + weights.l1 * l1 - weights.giou * giou
