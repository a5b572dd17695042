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


def quality_focal_losses(
    logits: Tensor, classes: Tensor, quality: Tensor, *, alpha: float, gamma: float
) -> Tensor:
    """Quality focal loss (arXiv 2006.04388 equation 2) with the balance of the focal loss.

    The score of a positive learns the quality ``q`` of its box instead of 1:
    ``alpha |q - p|^gamma BCE(p, q)``, which is the focal loss where ``q`` is 1.

    Args:
        logits: (Q, B, P, C).
        classes: (Q, B, P) int64 target class of each proposal, ``C`` for background.
        quality: (Q, B, P) in [0, 1], such as the IoU with the target; any value for background.
        alpha: balance of positives.
        gamma: exponent.

    Returns:
        (Q,).
    """
    is_class = F.one_hot(classes, logits.shape[-1] + 1)[..., :-1].bool()
    target = torch.where(is_class, quality.to(logits.dtype).unsqueeze(-1), 0.0)
    balance = torch.where(is_class, alpha, 1 - alpha)
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (balance * (target - logits.sigmoid()).abs() ** gamma * loss).sum(dim=(1, 2, 3))


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
