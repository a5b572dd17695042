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
        of one expert; ``dead``, share of the experts of all proposals that have a weight of less
        than 0.01 on every image; with several images ``variation``, mean total-variation distance
        between the weights of two of them, 0 if all get the same proposals and at most 1.
    """
    images, experts, _ = weights.shape
    plogp = weights * weights.clamp(min=torch.finfo(weights.dtype).tiny).log()
    entropy = -plogp.sum(dim=1).mean() / math.log(max(experts, 2))
    found = {"entropy": entropy, "dead": (weights.amax(dim=0) < 0.01).float().mean()}
    if images > 1:
        by_proposal = weights.permute(2, 0, 1)
        distance = torch.cdist(by_proposal, by_proposal, p=1.0) / 2
        found["variation"] = distance.sum(dim=(1, 2)).mean() / (images * (images - 1))
    return found
