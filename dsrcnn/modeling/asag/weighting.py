"""How much a query teaches: Query Weighting and the weight of small objects (ASAG section 3.5).

All weights are without gradient. Letters: any leading shape ``...``, ``C`` classes.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["area_weight", "quality_focal_loss", "query_weights", "weighted_class_loss"]

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
