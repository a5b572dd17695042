"""Dynamic instance interaction of Sparse R-CNN (arXiv 2011.12450, section 3.2)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DynamicConv(nn.Module):
    """Filter RoI features by two 1x1 convolutions whose weights each proposal generates.

    The names of the layers follow the official checkpoints.
    """

    def __init__(self, channels: int, dynamic_channels: int, positions: int) -> None:
        """Build the layers.

        Args:
            channels: ``D``, of proposal and RoI features.
            dynamic_channels: between the two generated convolutions.
            positions: ``K`` cells of a RoI.
        """
        super().__init__()
        self.channels = channels
        self.dynamic_channels = dynamic_channels
        self.dynamic_layer = nn.Linear(channels, 2 * channels * dynamic_channels)
        self.norm1 = nn.LayerNorm(dynamic_channels)
        self.norm2 = nn.LayerNorm(channels)
        self.out_layer = nn.Linear(channels * positions, channels)
        self.norm3 = nn.LayerNorm(channels)

    def forward(self, proposal_features: Tensor, roi_features: Tensor) -> Tensor:
        """Filter RoIs (N, K, D), cells row by row, by the kernels of their proposals (N, D)."""
        first, second = self._generate(proposal_features)
        kernel1 = first.unflatten(-1, (self.channels, self.dynamic_channels))
        kernel2 = second.unflatten(-1, (self.dynamic_channels, self.channels))
        x = F.relu(self.norm1(torch.bmm(roi_features, kernel1)))
        x = F.relu(self.norm2(torch.bmm(x, kernel2)))
        # Position-major flattening: the column order of official checkpoints.
        return F.relu(self.norm3(self.out_layer(x.flatten(1))))

    def _generate(self, proposal_features: Tensor) -> tuple[Tensor, Tensor]:
        """Both kernels of every proposal, flat: (N, D * dynamic channels) each."""
        layer = self.dynamic_layer
        if not torch.is_grad_enabled():
            first, second = layer(proposal_features).chunk(2, dim=-1)
            return first, second
        # The layer is split, not its output: the backward pass then joins two halves of the weight,
        # whose size is fixed, not the kernels, which grow with the number of RoIs.
        weights, biases = (p.unflatten(0, (2, -1)).unbind() for p in (layer.weight, layer.bias))
        kernels = zip(weights, biases, strict=True)
        first, second = (F.linear(proposal_features, w, b) for w, b in kernels)
        return first, second
