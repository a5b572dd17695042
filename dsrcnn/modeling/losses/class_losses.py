"""Classification losses, dense over all proposals and classes."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss


def focal_losses(logits: Tensor, classes: Tensor, *, alpha: float, gamma: float) -> Tensor:
    """Sigmoid focal loss (arXiv 1708.02002) summed over images, proposals and classes.

    Args:
        logits: (Q, B, P, C).
        classes: (Q, B, P) int64 target class of each proposal, ``C`` for background.
        alpha: balance of positives.
        gamma: exponent.

    Returns:
        (Q,).
    """
    one_hot = F.one_hot(classes, logits.shape[-1] + 1)[..., :-1].to(logits.dtype)
    loss: Tensor = sigmoid_focal_loss(logits, one_hot, alpha=alpha, gamma=gamma)
    return loss.sum(dim=(1, 2, 3))


def cross_entropy_losses(logits: Tensor, classes: Tensor, class_weights: Tensor) -> Tensor:
    """Weighted cross-entropy with a background class (DETR), summed for every set.

    Args:
        logits: (Q, B, P, C + 1).
        classes: (Q, B, P) int64, ``C`` for background.
        class_weights: (C + 1,).

    Returns:
        (Q,), to be divided by the sum of the weights of all proposals.
    """
    loss = F.cross_entropy(
        logits.flatten(0, 2), classes.flatten(), weight=class_weights, reduction="none"
    ).view_as(classes)
    return loss.sum(dim=(1, 2))


def weighted_class_loss(
    logits: Tensor, matched: Tensor, positive: Tensor, negative: Tensor, weight: Tensor
) -> Tensor:
    """Class loss of ASAG's Query Weighting (arXiv 2308.09242), not reduced.

    The matched class has the cross-entropies with 1 and with 0, by their weights; all others have
    the cross-entropy with 0 times the squared score.

    Args:
        logits: (..., C).
        matched: (..., C) bool, one class of every matched query, none of background.
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
    return torch.where(matched, weight.unsqueeze(-1) * both, background)


def quality_focal_loss(
    logits: Tensor, quality: Tensor, matched: Tensor, ignored: Tensor, weight: Tensor
) -> Tensor:
    """Loss of scores that predict an IoU (arXiv 2006.04388, equation 4, beta 2), not reduced.

    Args:
        logits: (...).
        quality: (...) IoU with the matched box; any values for background.
        matched: (...) bool.
        ignored: (...) bool, no background although not matched: no loss.
        weight: (...) of the ground truth.

    Returns:
        (...); the modulating factor has a gradient, too.
    """
    target = torch.where(matched, quality, torch.zeros_like(quality)).detach()
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    factor = (target - logits.sigmoid()) ** 2
    factor = torch.where(matched, weight * factor, factor)
    return (factor * entropy).masked_fill(ignored & ~matched, 0.0)
