"""Is a mixture of experts alive? Whether it chooses, and whether it looks at the image.

Letters: ``B`` images, ``E`` experts, ``P`` proposals.
"""

import math

import torch
from torch import Tensor

__all__ = ["mixing_statistics"]


@torch.no_grad()
def mixing_statistics(weights: Tensor) -> dict[str, Tensor]:
    """Sum up the weights of a batch.

    Args:
        weights: (B, E, P), summing to 1 over the experts.

    Returns:
        Scalars: ``entropy``, mean over images and proposals, 1 for equal weights and 0 for a choice
        of one expert; ``variation``, mean total-variation distance between the weights of two
        images, 0 if all images get the same proposals and at most 1; ``least_used`` and
        ``most_used``, mean weight of the expert that counts least and most, 0 and 1 for a model in
        which one expert does everything.
    """
    images, experts, _ = weights.shape
    plogp = weights * weights.clamp(min=torch.finfo(weights.dtype).tiny).log()
    entropy = -plogp.sum(dim=1).mean() / math.log(max(experts, 2))
    distance = torch.cdist(weights.mT.transpose(0, 1), weights.mT.transpose(0, 1), p=1.0) / 2
    pairs = max(images * (images - 1), 1)
    used = weights.mean(dim=(0, 2))
    return {
        "entropy": entropy,
        "variation": distance.sum(dim=(1, 2)).mean() / pairs,
        "least_used": used.min(),
        "most_used": used.max(),
    }
