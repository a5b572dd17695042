"""Standardized logits for DPG: what tells images apart, not what they have in common.

Letters: ``B`` images, ``E`` experts, ``P`` proposals.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from ...structures import at_least_float32

__all__ = ["build_logit_norm"]


class LogitNorm(nn.Module):
    """Mean 0 and variance 1 over images for every logit, in float32.

    The mean over experts, to which a softmax is blind, is taken off before: otherwise all logits of
    an image could go up and down together, and the experts would still weigh the same.
    """

    def __init__(self, experts: int, proposals: int, *, synchronized: bool = False) -> None:
        """Make running statistics for ``E * P`` logits; `synchronized` over processes, on GPUs."""
        super().__init__()
        norm = nn.SyncBatchNorm if synchronized else _ImageNorm
        self.norm = norm(experts * proposals, affine=False)

    def forward(self, logits: Tensor) -> Tensor:
        """(B, E, P) to (B, E, P)."""
        logits = at_least_float32(logits)
        relative = logits - logits.mean(dim=1, keepdim=True)
        return self.norm(relative.flatten(1)).view_as(logits)


class _ImageNorm(nn.BatchNorm1d):
    """A batch of one image has nothing to be compared with but the images before it."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and len(x) == 1:
            return F.batch_norm(x, self.running_mean, self.running_var, eps=self.eps)
        return super().forward(x)


def build_logit_norm(name: str, experts: int, proposals: int) -> nn.Module:
    """The norm of a name: BN, SyncBN (over the images of all processes, on GPUs) or none."""
    if name == "none":
        return nn.Identity()
    return LogitNorm(experts, proposals, synchronized=name == "SyncBN")
