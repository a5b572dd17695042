"""RoIAlign over a whole feature pyramid in one gather.

The usual implementation pools level by level. Here all levels of all images form one table of
rows with D channels, and a RoI cell is a weighted sum of rows: an embedding bag, whose output has
the channels last already. Values equal RoIAlign's to rounding, no shape depends on data, and the
host never waits.

Notation: ``R`` RoIs per image, ``K`` output cells per side, ``S`` sampling points per cell and
side, ``T`` rows of the table.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_CANONICAL_SIZE = 224.0  # side of a box that belongs to level 4


class FeatureTable(NamedTuple):
    """A feature pyramid as rows.

    Attributes:
        rows: (T, D), image by image, level by level, row by row.
        levels: (L, 4) int64: height, width, stride and first row of each level, finest first.
        images: number of images.
        finest: name of the first level; its stride is ``2 ** finest``.
    """

    rows: Tensor
    levels: Tensor
    images: int
    finest: int

    @classmethod
    def from_levels(cls, features: list[Tensor], strides: tuple[int, ...]) -> "FeatureTable":
        """Lay out pyramid levels (B, D, H_l, W_l) with their strides as one table."""
        rows = torch.cat([f.permute(0, 2, 3, 1).flatten(1, 2) for f in features], dim=1)
        sizes = [f.shape[2] * f.shape[3] for f in features]
        firsts = [sum(sizes[:i]) for i in range(len(sizes))]
        description = [
            (f.shape[2], f.shape[3], stride, first)
            for f, stride, first in zip(features, strides, firsts, strict=True)
        ]
        # Once for all stages: small as it is, it is a transfer to the device.
        levels = torch.tensor(description).to(rows.device, non_blocking=True)
        return cls(rows.flatten(0, 1), levels, features[0].shape[0], strides[0].bit_length() - 1)


def assign_levels(boxes: Tensor, num_levels: int, *, finest: int = 2) -> Tensor:
    """Assign boxes to pyramid levels by their size (FPN, arXiv 1612.03144, equation 1).

    Args:
        boxes: (..., 4) xyxy in pixels.
        num_levels: ``L``.
        finest: name of the first level (its stride is ``2 ** finest``).

    Returns:
        (...) int64, 0-based; degenerate boxes belong to the finest level.
    """
    area = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(dim=-1)
    level = torch.floor(4 + torch.log2(area.sqrt() / _CANONICAL_SIZE + 1e-8)) - finest
    return level.nan_to_num(0.0).clamp(0, num_levels - 1).long()


def _axis_weights(
    start: Tensor, extent: Tensor, limit: Tensor, cells: int, samples: int
) -> tuple[Tensor, Tensor]:
    """Index (int32) and weight of the two neighbors of each point along one axis: (N, K, 2 S).

    RoIs begin at `start` (N,), from the center of the first feature cell, and have the size
    `extent` (N,) in cells; `limit` (N,) is the number of cells of the level.
    """
    count = cells * samples
    # Midpoints i + 0.5 first, as RoIAlign computes them, to keep the same rounding.
    grid = (torch.arange(count, device=start.device) + 0.5) / count
    limit = limit.unsqueeze(1)
    position = start.unsqueeze(1) + grid.to(start.dtype) * extent.unsqueeze(1)
    inside = (position >= -1) & (position <= limit)
    position = torch.minimum(position.clamp(min=0), limit.to(position.dtype))
    low = position.long()
    at_edge = low >= limit - 1
    low = torch.minimum(low, limit - 1)
    fraction = (position - low).masked_fill(at_edge, 0.0)
    high = torch.minimum(low + 1, limit - 1)
    weight = torch.stack([1 - fraction, fraction], dim=-1) * inside.unsqueeze(-1) / samples
    index = torch.stack([low, high], dim=-1).int()  # half the memory, three times as fast to gather
    return index.view(-1, cells, 2 * samples), weight.view(-1, cells, 2 * samples)


def _sampling_weights(
    table: FeatureTable, boxes: Tensor, cells: int, samples: int, aligned: bool
) -> tuple[Tensor, Tensor]:
    """Table rows (int32) that each RoI cell averages, and weights: (B * R * K * K, 4 S * S)."""
    boxes = boxes.nan_to_num(0.0, 0.0, 0.0).flatten(0, 1)
    level = assign_levels(boxes, len(table.levels), finest=table.finest)
    height, width, stride, first_row = table.levels[level].unbind(1)
    image = torch.arange(boxes.shape[0], device=boxes.device) // (boxes.shape[0] // table.images)
    base = (first_row + image * (table.rows.shape[0] // table.images)).int()
    x1, y1, x2, y2 = (boxes / stride.unsqueeze(1).to(boxes.dtype)).unbind(1)
    shift, tall, wide = 0.5, y2 - y1, x2 - x1
    if not aligned:
        shift, tall, wide = 0.0, tall.clamp(min=1), wide.clamp(min=1)
    rows, row_weights = _axis_weights(y1 - shift, tall, height, cells, samples)
    columns, column_weights = _axis_weights(x1 - shift, wide, width, cells, samples)
    start = (base.view(-1, 1, 1) + rows * width.view(-1, 1, 1).int())[:, :, None, :, None]
    index = start + columns[:, None, :, None, :]  # (N, K, K, 2 S, 2 S)
    weight = row_weights[:, :, None, :, None] * column_weights[:, None, :, None, :]
    return index.flatten(3).flatten(0, 2), weight.flatten(3).flatten(0, 2)


def pool_rois(
    table: FeatureTable, boxes: Tensor, *, cells: int = 7, samples: int = 2, aligned: bool = True
) -> Tensor:
    """Pool boxes from the pyramid level that fits their size, by RoIAlign.

    Gradients reach the features, not the boxes.

    Args:
        table: the feature pyramid.
        boxes: (B, R, 4) xyxy in pixels; coordinates that are not finite count as zero.
        cells: ``K``.
        samples: ``S``.
        aligned: as ``ROIAlignV2``; False as ``ROIAlign``, which takes the center of the first cell
            for the corner of the image and pools at least one cell.

    Returns:
        (B * R, K * K, D).
    """
    with torch.no_grad():
        index, weight = _sampling_weights(table, boxes, cells, samples, aligned)
    pooled = F.embedding_bag(
        index, table.rows, mode="sum", per_sample_weights=weight.to(table.rows.dtype)
    )
    return pooled.view(-1, cells * cells, table.rows.shape[1])
