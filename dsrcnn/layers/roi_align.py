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

from .constants import made_once

_CANONICAL_SIZE = 224.0  # side of a box that belongs to level 4


class Levels(NamedTuple):
    """Geometry of pyramid levels, finest first.

    Attributes:
        places: (L, 3) float32: one over the stride, last column and last row.
        layout: (L, 2) int32: width, first row in the table of an image.
        images: (B, 1) int32, first row of every image; None for one image.
        areas: (L - 1,) float32, area of a box in pixels from which the next level is used.
        neighbors: (2,) float32, 1 and 0: weights of the neighbors of a point are its distances.
        shift: (2,) float32, -0.5 and 0: of RoIAlign with and without alignment.
        zero: () float32.
    """

    places: Tensor
    layout: Tensor
    images: Tensor | None
    areas: Tensor
    neighbors: Tensor
    shift: Tensor
    zero: Tensor


class FeatureTable(NamedTuple):
    """A feature pyramid as rows.

    Attributes:
        rows: (T, D), image by image, level by level, row by row.
        levels: their geometry.
    """

    rows: Tensor
    levels: Levels

    @classmethod
    def from_levels(cls, features: list[Tensor], strides: tuple[int, ...]) -> "FeatureTable":
        """Lay out pyramid levels (B, D, H_l, W_l) with their strides as one table."""
        rows = torch.cat([f.permute(0, 2, 3, 1).flatten(1, 2) for f in features], dim=1)
        sizes = tuple((int(f.shape[2]), int(f.shape[3])) for f in features)
        # A symbol in exported models, but not a tensor, as shapes are while tracing.
        images = len(rows) if torch.jit.is_tracing() else rows.shape[0]
        return cls(rows.flatten(0, 1), _levels(sizes, strides, images, rows.device))


@made_once
def _levels(
    sizes: tuple[tuple[int, int], ...],
    strides: tuple[int, ...],
    images: int,
    device: torch.device,
) -> Levels:
    """Describe levels of the sizes (height, width)."""
    places, layout, first = [], [], 0
    for (height, width), stride in zip(sizes, strides, strict=True):
        places.append((1 / stride, width - 1, height - 1))
        layout.append((width, first))
        first += height * width
    finest = strides[0].bit_length() - 1
    # Level k from a side of 224 * 2^(k - 4) on; the formula of FPN adds 1e-8 to side / 224.
    bounds = [(2.0 ** (finest + 1 + i - 4) - 1e-8) * _CANONICAL_SIZE for i in range(len(sizes) - 1)]
    is_one = isinstance(images, int) and images == 1
    rows = torch.arange(images, dtype=torch.int32, device=device) * first
    return Levels(
        places=torch.tensor(places, device=device),
        layout=torch.tensor(layout, dtype=torch.int32, device=device),
        images=None if is_one else rows.unsqueeze(1),
        areas=torch.tensor([bound**2 for bound in bounds], device=device),
        neighbors=torch.tensor([1.0, 0.0], device=device),
        shift=torch.tensor([-0.5, 0.0], device=device),
        zero=torch.tensor(0.0, device=device),
    )


def assign_levels(boxes: Tensor, areas: Tensor) -> Tensor:
    """Assign boxes to pyramid levels by their size (FPN, arXiv 1612.03144, equation 1).

    Args:
        boxes: (..., 4) xyxy in pixels.
        areas: see `Levels`.

    Returns:
        (...) int64, 0-based; degenerate boxes belong to the finest level.
    """
    area = (boxes[..., 2:] - boxes[..., :2]).prod(dim=-1)
    return torch.bucketize(area, areas.to(area.dtype), right=True)


@made_once
def _offsets(count: int, size: int, device: torch.device) -> Tensor:
    """First entries (count,) int32 of bags of equal size."""
    return torch.arange(0, count * size, size, dtype=torch.int32, device=device)


@made_once
def _grid(count: int, device: torch.device) -> Tensor:
    """Midpoints (count,) of equal parts of 0..1, as RoIAlign computes them."""
    return (torch.arange(count, device=device) + 0.5) / count


def _axis_weights(
    start: Tensor, extent: Tensor, levels: Levels, places: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """Index (int32) and weight of the two neighbors of each sampling point: (B, R, 2, count, 2).

    Both axes at once, x first. RoIs begin at `start` (B, R, 2), from the center of the first
    feature cell, and have the size `extent` (B, R, 2) in cells; `places` (B, R, 3) are the rows of
    their levels.
    """
    grid = _grid(count, start.device).to(start.dtype)
    position = torch.addcmul(start.unsqueeze(-1), grid, extent.unsqueeze(-1))
    last = places[..., 1:].unsqueeze(-1)
    # To the feature cells; points more than one cell away from them count as zero.
    point = torch.clamp(position, levels.zero, last)
    inside = (position - point).abs() <= 1
    weight = (point.frac().unsqueeze(-1) - levels.neighbors).abs() * inside.unsqueeze(-1)
    # The upper neighbor of a point on a cell is the cell, with weight 0, so none is outside.
    index = torch.stack([point, point.ceil()], dim=-1).int()
    return index, weight


def _sampling_weights(
    table: FeatureTable, boxes: Tensor, cells: int, samples: int, aligned: bool
) -> tuple[Tensor, Tensor]:
    """Table rows (int32) that each RoI cell averages, and weights: (B * R * K * K, 4 S * S)."""
    boxes = boxes.nan_to_num(0.0, 0.0, 0.0)
    levels = table.levels
    level = assign_levels(boxes, levels.areas)
    places, layout = levels.places[level], levels.layout[level]
    shift = levels.shift[0 if aligned else 1]
    start, end = torch.addcmul(shift, boxes, places[..., :1]).split(2, dim=-1)
    extent = end - start
    if not aligned:
        extent = extent.clamp(min=1)
    index, weight = _axis_weights(start, extent, levels, places, cells * samples)
    per_axis = (*boxes.shape[:2], 2, cells, 2 * samples)
    (columns, rows), (wide, tall) = (x.view(per_axis).unbind(2) for x in (index, weight))
    width, first = layout.unbind(-1)
    if levels.images is not None:
        first = first + levels.images
    rows = torch.addcmul(first[..., None, None], rows, width[..., None, None])
    index = rows[..., :, None, :, None] + columns[..., None, :, None, :]  # (B, R, K, K, 2 S, 2 S)
    product = (tall[..., :, None, :, None], wide[..., None, :, None, :])
    weight = torch.addcmul(levels.zero, *product, value=1 / samples**2)
    size = 4 * samples * samples
    return index.view(-1, size), weight.view(-1, size)


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
    # Indices are int32: half the memory, three times as fast to gather.
    with torch.no_grad():
        index, weight = _sampling_weights(table, boxes, cells, samples, aligned)
    if torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export():
        return _pool_by_gather(table.rows, index, weight, boxes.shape, cells)
    offsets = _offsets(*index.shape, index.device)
    pooled = F.embedding_bag(
        index.view(-1),
        table.rows,
        offsets,
        mode="sum",
        per_sample_weights=weight.view(-1).to(table.rows.dtype),
    )
    return pooled.view(-1, cells * cells, table.rows.shape[1])


_PART = 1 << 22  # bytes of gathered features, which stay in the cache of a core


def _pool_by_gather(
    rows: Tensor, index: Tensor, weight: Tensor, shape: torch.Size, cells: int
) -> Tensor:
    """Pool boxes of `shape` (B, R, 4) in ONNX, which has no embedding bags, in parts.

    See `_sampling_weights` for index and weight.
    """
    size, channels = index.shape[1], rows.shape[1]
    per_roi = (shape[0], shape[1], cells * cells, size)
    part = max(_PART // (4 * cells * cells * size * channels), 1)
    indices, weights = (x.view(per_roi).split(part, dim=1) for x in (index, weight))
    pooled = []
    for places, shares in zip(indices, weights, strict=True):
        gathered = rows.index_select(0, places.flatten().long()).unflatten(0, (-1, size))
        mean = shares.reshape(-1, 1, size) @ gathered
        pooled.append(mean.view(shape[0], -1, cells * cells, channels))
    return torch.cat(pooled, dim=1).flatten(0, 1)
