"""Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159, section 4.1).

Every query attends to a few points around its reference, in all levels of a pyramid. Places are
x and y as fractions: of the image before padding, or of a whole level where that is said.

Notation: ``N`` tokens of all levels, ``R`` queries, ``H`` heads, ``K`` points of a head and level.
"""

import math
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .constants import made_once

Shape = tuple[int, int]  # height, width


class TokenPyramid(NamedTuple):
    """Levels of a batch of padded images as one sequence of tokens.

    Attributes:
        tokens: (B, N, D), level by level and row by row.
        shapes: height and width of the levels.
        is_padding: (B, N) bool.
        places: (B, N, 2) centers of the tokens as fractions of the image.
        covered: (B, L, 2) fractions of the width and height of a level that the image covers.
        cells: (L, 2) one over the width and height of a level.
        sizes: (B, 4) ``w, h, w, h`` of each image before padding, in pixels.
    """

    tokens: Tensor
    shapes: tuple[Shape, ...]
    is_padding: Tensor
    places: Tensor
    covered: Tensor
    cells: Tensor
    sizes: Tensor

    @classmethod
    def from_levels(cls, levels: Sequence[Tensor], sizes: Tensor, padded: Shape) -> "TokenPyramid":
        """Lay out levels (B, D, H_l, W_l) of images of `sizes` that were padded to `padded`.

        A cell is padding if its first pixel is.
        """
        shapes = tuple((int(x.shape[2]), int(x.shape[3])) for x in levels)
        is_padding, places, covered = [], [], []
        for height, width in shapes:
            columns = torch.arange(width, device=sizes.device)
            rows = torch.arange(height, device=sizes.device)
            has_columns = columns * (padded[1] / width) < sizes[:, :1]
            has_rows = rows * (padded[0] / height) < sizes[:, 1:2]
            counts = torch.stack([has_columns.sum(dim=1), has_rows.sum(dim=1)], dim=1)
            x = ((columns + 0.5) / counts[:, :1]).unsqueeze(1).expand(-1, height, -1)
            y = ((rows + 0.5) / counts[:, 1:]).unsqueeze(2).expand(-1, -1, width)
            places.append(torch.stack([x, y], dim=-1).flatten(1, 2))
            is_padding.append(~(has_rows.unsqueeze(2) & has_columns.unsqueeze(1)).flatten(1))
            covered.append(counts)
        cells = _cells(shapes, sizes.device)
        return cls(
            torch.cat([x.flatten(2).transpose(1, 2) for x in levels], dim=1),
            shapes,
            torch.cat(is_padding, dim=1),
            torch.cat(places, dim=1),
            torch.stack(covered, dim=1) * cells,
            cells,
            sizes,
        )


@made_once
def _cells(shapes: tuple[Shape, ...], device: torch.device) -> Tensor:
    return torch.tensor([(1 / width, 1 / height) for height, width in shapes], device=device)


class References(NamedTuple):
    """Where queries sample: at ``center + offset * unit``, in fractions of whole levels.

    Attributes:
        centers: (B, R, L, 2).
        units: (B, R, L, 2), or of a shape that is broadcast to it.
    """

    centers: Tensor
    units: Tensor

    @classmethod
    def at_tokens(cls, pyramid: TokenPyramid) -> "References":
        """Let the tokens themselves be the queries, with offsets in cells of each level."""
        return cls(_on_levels(pyramid.places, pyramid.covered), pyramid.cells)

    @classmethod
    def at_boxes(cls, boxes: Tensor, pyramid: TokenPyramid, points: int) -> "References":
        """Sample around boxes (B, R, 4), center and size as fractions of the image.

        Offsets are in halves of the box divided by the number of `points` (appendix A.4), or in
        cells along a side of zero: such a box is a point.
        """
        center, size = boxes.split(2, dim=-1)
        halves = _on_levels(size * (0.5 / points), pyramid.covered)
        units = torch.where(size.unsqueeze(2) > 0, halves, pyramid.cells.to(halves.dtype))
        return cls(_on_levels(center, pyramid.covered), units)


def _on_levels(places: Tensor, covered: Tensor) -> Tensor:
    """Convert fractions (B, R, 2) of the image to fractions (B, R, L, 2) of each level."""
    return places.unsqueeze(2) * covered.unsqueeze(1).to(places.dtype)


def sample_levels(
    values: Tensor, shapes: Sequence[Shape], locations: Tensor, weights: Tensor
) -> Tensor:
    """Sum bilinear samples of all levels (equation 3 without its linear layers).

    Args:
        values: (B, N, H, d) tokens of all levels.
        shapes: height and width of the levels.
        locations: (B, R, H, L, K, 2) x and y as fractions of a level, zero is read outside of it.
        weights: (B, R, H, L, K).

    Returns:
        (B, R, H * d).
    """
    images, _, heads, depth = values.shape
    # Heads become images: each samples its part of the channels at its own points.
    grids = (2 * locations - 1).transpose(1, 2).flatten(0, 1)
    weights = weights.transpose(1, 2).flatten(0, 1).unsqueeze(1)
    levels = values.split([height * width for height, width in shapes], dim=1)
    total: Tensor | None = None
    # Level by level: the samples of all of them are the largest tensor of the model.
    for index, (tokens, shape) in enumerate(zip(levels, shapes, strict=True)):
        maps = tokens.permute(0, 2, 3, 1).reshape(images * heads, depth, *shape)
        sampled = F.grid_sample(maps, grids[:, :, index], align_corners=False)
        part = (sampled * weights[:, :, :, index]).sum(dim=-1)
        total = part if total is None else total + part
    assert total is not None  # a pyramid has levels
    return total.view(images, heads * depth, -1).transpose(1, 2)


class PointLinear(nn.Linear):
    """Linear layer that predicts points; it is trained at a tenth of the rate (appendix A.4).

    Attributes:
        learning_rate_factor: of its parameters, for the optimizer.
    """

    learning_rate_factor: ClassVar[float] = 0.1


class DeformableAttention(nn.Module):
    """Attention to ``K`` points per head and level, whose offsets and weights the query predicts.

    Parameter names follow the official checkpoints.
    """

    def __init__(self, channels: int, heads: int, levels: int, points: int) -> None:
        """Build the layers for features of `channels`, a multiple of `heads`."""
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        count = heads * levels * points
        self.sampling_offsets = PointLinear(channels, 2 * count)
        self.attention_weights = nn.Linear(channels, count)
        self.value_proj = nn.Linear(channels, channels)
        self.output_proj = nn.Linear(channels, channels)
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Let each head look in one direction, 1 to ``K`` units far, with equal weights."""
        for layer in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        angles = torch.arange(self.heads) * (2 * math.pi / self.heads)
        directions = torch.stack([angles.cos(), angles.sin()], dim=1)
        directions /= directions.abs().amax(dim=1, keepdim=True)  # onto the sides of a square
        steps = torch.arange(1, self.points + 1).view(1, 1, -1, 1)
        offsets = directions.view(-1, 1, 1, 2) * steps
        bias = self.sampling_offsets.bias.view(self.heads, self.levels, self.points, 2)
        bias.copy_(offsets.expand_as(bias))

    def forward(self, queries: Tensor, references: References, pyramid: TokenPyramid) -> Tensor:
        """Attend to the tokens of the image; padding counts as zero.

        Args:
            queries: (B, R, D).
            references: of the queries.
            pyramid: what is attended to.

        Returns:
            (B, R, D).
        """
        values = self.value_proj(pyramid.tokens)
        values = values.masked_fill(pyramid.is_padding.unsqueeze(-1), 0.0)
        shape = (self.heads, self.levels, self.points)
        offsets = self.sampling_offsets(queries).unflatten(-1, (*shape, 2))
        scores = self.attention_weights(queries).unflatten(-1, (self.heads, -1))
        # Half precision has no more than 256 places between 0 and 1.
        with torch.autocast(queries.device.type, enabled=False):
            dtype = torch.promote_types(queries.dtype, torch.float32)
            centers, units = (x.to(dtype)[..., None, :, None, :] for x in references)
            locations = centers + offsets.to(dtype) * units
            weights = scores.to(dtype).softmax(dim=-1).unflatten(-1, shape[1:])
            values = values.to(dtype).unflatten(-1, (self.heads, -1))
            sampled = sample_levels(values, pyramid.shapes, locations, weights)
        attended: Tensor = self.output_proj(sampled)
        return attended
