"""Dynamic instance interaction of Sparse R-CNN (arXiv 2011.12450, section 3.2).

Each proposal feature generates the weights of two 1x1 convolutions, which then filter the RoI
feature of that same proposal: every object has a filter of its own.

Letters: ``N`` RoIs, ``K`` positions of a RoI (49), ``D`` channels, ``H`` channels in between.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["DynamicConv"]


class DynamicConv(nn.Module):
    """Two per-proposal 1x1 convolutions over RoI features, then a projection of the whole RoI."""

    def __init__(self, channels: int, dynamic_channels: int, positions: int) -> None:
        """Make the layers under the official checkpoint's names.

        Args:
            channels: ``D``, of proposal features and RoI features.
            dynamic_channels: ``H``, between the two generated convolutions.
            positions: ``K``, the number of cells of a pooled RoI.
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
        """Filter every RoI by the kernels its proposal generates.

        Args:
            proposal_features: (N, D).
            roi_features: (N, K, D), positions row by row.

        Returns:
            (N, D) object features.
        """
        # The layer is split, not its output: the backward pass then joins two halves of the weight,
        # whose size is fixed, and not the kernels, which grow with the number of RoIs.
        layer = self.dynamic_layer
        weights, biases = (p.unflatten(0, (2, -1)).unbind() for p in (layer.weight, layer.bias))
        first, second = (
            F.linear(proposal_features, w, b) for w, b in zip(weights, biases, strict=True)
        )
        kernel1 = first.unflatten(-1, (self.channels, self.dynamic_channels))
        kernel2 = second.unflatten(-1, (self.dynamic_channels, self.channels))
        x = F.relu(self.norm1(torch.bmm(roi_features, kernel1)))
        x = F.relu(self.norm2(torch.bmm(x, kernel2)))
        # Position-major flattening: the column order of official checkpoints.
        return F.relu(self.norm3(self.out_layer(x.flatten(1))))
