"""Patches: windows of 15 x 15 cells of a pyramid level, in which ASAG predicts anchors.

ASAG, arXiv 2308.09242, section 3.2. Notation: ``m`` patches, ``K`` cells per side of a patch, ``A``
anchors per patch. The position of a patch is the x and y of its upper left cell.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms

CELLS = 15  # per side of a patch
PATCH_OVERLAP = 0.25  # IoU above which one of two patches is redundant


def crop_positions(centers: Tensor, sizes: Tensor, stride: int) -> Tensor:
    """Place patches around centers (m, 2), but inside of their images (m, 2); all in pixels.

    Returns:
        (m, 2) int64 positions, 0 where an image is smaller than a patch.
    """
    position = torch.floor(centers / stride - CELLS / 2)
    limit = torch.ceil(sizes / stride) - CELLS
    return torch.minimum(position, limit).clamp(min=0).long()


def patch_nms(centers: Tensor, scores: Tensor, images: Tensor, stride: int) -> Tensor:
    """Remove patches with centers (m, 2) in pixels that overlap a better one of the same image.

    Returns the indices of the remaining patches, best first; none is moved inside before.
    """
    # Shifted by half a side: `batched_nms` separates images correctly only for coordinates >= 0.
    squares = torch.cat([centers, centers + CELLS * stride], dim=1)
    kept: Tensor = batched_nms(squares, scores, images, PATCH_OVERLAP)
    return kept


def rank_in_group(groups: Tensor) -> Tensor:
    """Count the earlier entries of the same group: (m,) int64 to (m,) int64."""
    order = groups.argsort(stable=True)
    counts = groups.bincount()
    starts = counts.cumsum(0) - counts
    place = torch.arange(len(groups), device=groups.device) - starts[groups[order]]
    return torch.empty_like(groups).scatter(0, order, place)


def resize_valid(level: Tensor, sizes: Tensor, side: int) -> Tensor:
    """Crop each image's part of a map, without the padding, and resize it bilinearly.

    Args:
        level: (B, C, H, W).
        sizes: (B, 2) width and height of each part in cells.
        side: of the result.

    Returns:
        (B, C, side, side), equal to `F.interpolate` of each part.
    """
    steps = (torch.arange(side, device=level.device) + 0.5) / side
    cells = sizes.clamp(min=1).unsqueeze(-1).to(level.dtype)  # (B, 2, 1)
    places = (cells * steps - 0.5).clamp(min=0).minimum(cells - 1)
    last = sizes.new_tensor([level.shape[3] - 1, level.shape[2] - 1]).clamp(min=1)
    x, y = (places / last.view(1, 2, 1) * 2 - 1).to(level.dtype).unbind(1)
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=-1)
    return F.grid_sample(level, grid, padding_mode="border", align_corners=True)


def cut_patches(level: Tensor, images: Tensor, positions: Tensor) -> Tensor:
    """Cut patches (m, K * K, C), cells row by row, out of a map (B, C, H, W) padded with zeros."""
    windows, inside = _windows(level, images, positions, CELLS)
    return torch.where(inside.unsqueeze(-1), windows, 0.0).flatten(1, 2)


def _windows(level: Tensor, images: Tensor, positions: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Windows (m, side, side, C), and which of their cells are inside the map, (m, side, side)."""
    height, width = level.shape[2:]
    steps = torch.arange(side, device=level.device)
    rows, columns = positions[:, 1:] + steps, positions[:, :1] + steps
    has_row, has_column = ((x >= 0) & (x < n) for x, n in ((rows, height), (columns, width)))
    rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
    # Advanced indices around a slice put the patches in front and the channels last.
    image, row, column = images[:, None, None], rows[:, :, None], columns[:, None, :]
    windows = level.permute(0, 2, 3, 1)[image, row, column]
    return windows, has_row[:, :, None] & has_column[:, None, :]


class PatchCompressor(nn.Sequential):
    """Reduce the channels of a pyramid level before patches are cut from it."""

    def __init__(self, channels: int, compressed: int) -> None:
        super().__init__(
            nn.Conv2d(channels, channels // 2, 1),
            nn.GELU(),
            nn.Conv2d(channels // 2, compressed, 3, padding=1),
        )

    def patches(self, level: Tensor, images: Tensor, positions: Tensor) -> Tensor:
        """Return patches (m, K * K, C) of the compressed `level` (B, D, H, W).

        The whole map is computed only if the patches cover most of it.
        """
        side = CELLS + 2  # what a 3 x 3 convolution reads
        if len(images) * side**2 >= level[:, 0].numel():
            return cut_patches(self(level), images, positions)
        first, second = cast(nn.Conv2d, self[0]), cast(nn.Conv2d, self[2])
        windows, inside = _windows(level, images, positions - 1, side)
        x = self[1](F.linear(windows, first.weight.flatten(1), first.bias))
        x = torch.where(inside.unsqueeze(-1), x, 0.0)  # as the second convolution is padded
        x = F.conv2d(x.permute(0, 3, 1, 2), second.weight, second.bias)
        return torch.where(inside[:, None, 1:-1, 1:-1], x, 0.0).flatten(2).transpose(1, 2)


def from_patches(boxes: Tensor, positions: Tensor, stride: int) -> Tensor:
    """Convert boxes (m, A, 4) cxcywh from fractions of their patch to pixels of the image."""
    scaled = boxes * (CELLS * stride)
    shift = (positions * stride).to(boxes.dtype).unsqueeze(1)
    return torch.cat([scaled[..., :2] + shift, scaled[..., 2:]], dim=-1)
