"""Adaptive mixing of sampled features (AdaMixer, arXiv 2203.16507, section 3.3)."""

import torch.nn.functional as F
from torch import Tensor, nn


class AdaptiveMixing(nn.Module):
    """Mix channels, then points, by weights that each proposal generates; add the result to it."""

    def __init__(
        self, channels: int, groups: int, in_points: int, out_points: int, activation: nn.Module
    ) -> None:
        """Build the layers for features of `channels` (``D``) in `groups` (``G``).

        Each group has `in_points`, and `out_points` after mixing.
        """
        super().__init__()
        self.groups, self.in_points, self.out_points = groups, in_points, out_points
        self.width = channels // groups
        self.channel_weights = self.width * self.width
        count = groups * (self.channel_weights + in_points * out_points)
        self.parameter_generator = nn.Linear(channels, count)
        self.out_proj = nn.Linear(groups * out_points * self.width, channels)
        self.activation = activation

    def initialize(self) -> None:
        """Start with the same mixing for all proposals: that of a random bias."""
        bound = self.parameter_generator.in_features**-0.5  # as torch draws it
        nn.init.uniform_(self.parameter_generator.bias, -bound, bound)
        nn.init.zeros_(self.parameter_generator.weight)

    def forward(self, sampled: Tensor, features: Tensor) -> Tensor:
        """Mix samples (R, G, points, D / G) into the features (R, D) of ``R`` proposals."""
        generated = self.parameter_generator(features).unflatten(-1, (self.groups, -1))
        channels = generated[..., : self.channel_weights].unflatten(-1, (self.width, self.width))
        points = generated[..., self.channel_weights :]
        points = points.unflatten(-1, (self.out_points, self.in_points))
        mixed = self.activation(_norm(sampled @ channels))
        mixed = self.activation(_norm(points @ mixed))
        result: Tensor = features + self.out_proj(mixed.flatten(1))
        return result


def _norm(x: Tensor) -> Tensor:
    """Normalize over points and channels together, without parameters."""
    return F.layer_norm(x, x.shape[-2:])
