"""Standardized logits for DPG: what tells images apart, not what they have in common.

Letters: ``B`` images, ``E`` experts, ``P`` proposals.
"""

from torch import Tensor, nn

from ...layers.image_norm import ImageNorm
from ...structures import at_least_float32

__all__ = ["LogitNorm"]


class LogitNorm(nn.Module):
    """Mean 0 and variance 1 over images for every logit, in float32.

    The mean over experts, to which a softmax is blind, is taken off before: otherwise all logits of
    an image could go up and down together, and the experts would still weigh the same.
    """

    def __init__(self, experts: int, proposals: int) -> None:
        """Make running statistics for ``E * P`` logits."""
        super().__init__()
        self.norm = ImageNorm(experts * proposals)

    def forward(self, logits: Tensor) -> Tensor:
        """(B, E, P) to (B, E, P)."""
        logits = at_least_float32(logits)
        relative = logits - logits.mean(dim=1, keepdim=True)
        return self.norm(relative.flatten(1)).view_as(logits)
