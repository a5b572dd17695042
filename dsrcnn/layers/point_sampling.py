"""Features at points of a pyramid in three dimensions: x, y and scale (AdaMixer section 3.3)."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["GroupedPyramid", "sample_points"]


class GroupedPyramid(NamedTuple):
    """Pyramid levels whose channels are cut into groups, as `sample_points` reads them.

    Attributes:
        levels: (B * G, D / G, H_l, W_l) each, finest first.
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
        """From maps (B, D, H_l, W_l)."""
        cut = [x.contiguous().view(-1, x.shape[1] // groups, *x.shape[2:]) for x in levels]
        return cls(tuple(cut), tuple(strides), groups)


def sample_points(pyramid: GroupedPyramid, points: Tensor) -> Tensor:
    """Read every level at every point, bilinearly, and blend the levels by their distance in scale.

    A level's weight is the softmax over levels of ``-(z - log2(stride))^2 / 2``.

    Args:
        pyramid: of ``B`` images.
        points: (B, N, G, P, 3) x and y in pixels of the network input, z as log2 of pixels.

    Returns:
        (B, N, G, P, D / G); zeros outside of the maps.
    """
    batch, count, groups, each = points.shape[:4]
    # Numbers of the host go in one by one: a tensor of them would be a transfer in every stage.
    distances = [points[..., 2] - math.log2(stride) for stride in pyramid.strides]
    weights = (-0.5 * torch.stack(distances, dim=-1) ** 2).softmax(dim=-1)
    # To one image for each group, as the levels are.
    place = points[..., :2].transpose(1, 2).reshape(batch * groups, count, each, 2)
    weights = weights.transpose(1, 2).reshape(batch * groups, 1, count, each, -1)
    total: Tensor | None = None
    for index, (level, stride) in enumerate(zip(pyramid.levels, pyramid.strides, strict=True)):
        height, width = (side * stride for side in level.shape[2:])
        x, y = place.unbind(-1)
        grid = torch.stack([2 * x / width - 1, 2 * y / height - 1], dim=-1).to(level.dtype)
        read = F.grid_sample(level, grid, padding_mode="zeros", align_corners=False)
        part = read * weights[..., index].to(read.dtype)
        total = part if total is None else total + part
    assert total is not None  # a pyramid has levels
    return total.view(batch, groups, -1, count, each).permute(0, 3, 1, 4, 2)
