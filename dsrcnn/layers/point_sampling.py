"""Sampling of a pyramid at points in x, y and scale (AdaMixer, arXiv 2203.16507, section 3.3)."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class GroupedPyramid(NamedTuple):
    """Pyramid levels with channels split into groups.

    Attributes:
        levels: (B * G, D / G, H_l, W_l), finest first.
        strides: of the levels, in pixels.
        groups: ``G``.
    """

    levels: tuple[Tensor, ...]
    strides: tuple[int, ...]
    groups: int

    @classmethod
    def from_levels(
        cls, levels: Sequence[Tensor], strides: Sequence[int], groups: int
    ) -> "GroupedPyramid":
        """Split the channels of maps (B, D, H_l, W_l) into groups."""
        split = [x.contiguous().view(-1, x.shape[1] // groups, *x.shape[2:]) for x in levels]
        return cls(tuple(split), tuple(strides), groups)


def sample_points(pyramid: GroupedPyramid, points: Tensor) -> Tensor:
    """Sample every level bilinearly and average the levels by their distance in scale.

    The weight of a level is the softmax over levels of ``-(z - log2(stride))^2 / 2``.

    Args:
        pyramid: of ``B`` images.
        points: (B, N, G, P, 3) x and y in pixels of the network input, z = log2 of pixels.

    Returns:
        (B, N, G, P, D / G), zeros outside of the maps.
    """
    batch, count, groups, number = points.shape[:4]
    # One by one: a tensor of strides would be a transfer to the device in every stage.
    distances = [points[..., 2] - math.log2(stride) for stride in pyramid.strides]
    weights = (-0.5 * torch.stack(distances, dim=-1) ** 2).softmax(dim=-1)
    # Groups become images, as in the levels.
    place = points[..., :2].transpose(1, 2).reshape(batch * groups, count, number, 2)
    weights = weights.transpose(1, 2).reshape(batch * groups, 1, count, number, -1)
    total: Tensor | None = None
    for index, (level, stride) in enumerate(zip(pyramid.levels, pyramid.strides, strict=True)):
        height, width = (side * stride for side in level.shape[2:])
        x, y = place.unbind(-1)
        grid = torch.stack([2 * x / width - 1, 2 * y / height - 1], dim=-1).to(level.dtype)
        sampled = F.grid_sample(level, grid, padding_mode="zeros", align_corners=False)
        part = sampled * weights[..., index].to(sampled.dtype)
        total = part if total is None else total + part
    assert total is not None  # a pyramid has levels
    return total.view(batch, groups, -1, count, number).permute(0, 3, 1, 4, 2)
