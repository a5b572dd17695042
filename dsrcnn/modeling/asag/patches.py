"""Patches: windows of 15 x 15 cells, the unit in which ASAG predicts anchors.

ASAG, arXiv 2308.09242, section 3.2. Letters: ``B`` images, ``m`` patches, ``K`` cells per side of a
patch, ``A`` anchors per patch.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms

__all__ = [
    "PatchCompressor",
    "crop_positions",
    "cut_patches",
    "from_patches",
    "rank_in_group",
    "resize_valid",
    "thinned",
]


def crop_positions(centres: Tensor, sizes: Tensor, stride: int, cells: int) -> Tensor:
    """Upper left cells of patches around centres, moved into their images.

    Args:
        centres: (m, 2) x and y in pixels.
        sizes: (m, 2) width and height of each one's image in pixels.
        stride: of the level.
        cells: ``K``.

    Returns:
        (m, 2) int64, x and y in cells; not negative where an image is smaller than a patch.
    """
    position = torch.floor(centres / stride - cells / 2)
    limit = torch.ceil(sizes / stride) - cells
    return torch.minimum(position, limit).clamp(min=0).long()


def thinned(
    centres: Tensor, scores: Tensor, images: Tensor, side: float, threshold: float
) -> Tensor:
    """Indices of patches that do not overlap a better one of their image too much, best first.

    Args:
        centres: (m, 2) in pixels.
        scores: (m,).
        images: (m,) int64, the image of each.
        side: of the patches in pixels.
        threshold: IoU above which the one with the lower score goes.
    """
    # Shifted by half a side: what tells images apart needs coordinates that are not negative.
    squares = torch.cat([centres, centres + side], dim=1)
    kept: Tensor = batched_nms(squares, scores, images, threshold)
    return kept


def rank_in_group(groups: Tensor) -> Tensor:
    """How many entries of the same group stand before each one: (m,) int64 to (m,) int64."""
    order = groups.argsort(stable=True)
    counts = groups.bincount()
    starts = counts.cumsum(0) - counts
    place = torch.arange(len(groups), device=groups.device) - starts[groups[order]]
    return torch.empty_like(groups).scatter(0, order, place)


def resize_valid(level: Tensor, sizes: Tensor, side: int) -> Tensor:
    """The parts of a map that images cover, resized bilinearly.

    Args:
        level: (B, C, H, W).
        sizes: (B, 2) width and height of each part in cells.
        side: of the result.

    Returns:
        (B, C, side, side), what `F.interpolate` makes of each part by itself.
    """
    steps = (torch.arange(side, device=level.device) + 0.5) / side
    cells = sizes.clamp(min=1).unsqueeze(-1).to(level.dtype)  # (B, 2, 1)
    places = (cells * steps - 0.5).clamp(min=0).minimum(cells - 1)
    last = sizes.new_tensor([level.shape[3] - 1, level.shape[2] - 1]).clamp(min=1)
    x, y = (places / last.view(1, 2, 1) * 2 - 1).to(level.dtype).unbind(1)
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=-1)
    return F.grid_sample(level, grid, padding_mode="border", align_corners=True)


def cut_patches(level: Tensor, images: Tensor, positions: Tensor, cells: int) -> Tensor:
    """Windows of a map.

    Args:
        level: (B, C, H, W); a side below `cells` counts as continued with zeros.
        images: (m,) int64.
        positions: (m, 2) x and y of the upper left cells.
        cells: ``K``.

    Returns:
        (m, K * K, C), row after row.
    """
    windows, inside = _windows(level, images, positions, cells)
    return torch.where(inside.unsqueeze(-1), windows, 0.0).flatten(1, 2)


def _windows(level: Tensor, images: Tensor, positions: Tensor, cells: int) -> tuple[Tensor, Tensor]:
    """Windows (m, K, K, C), and which of their cells the map has, (m, K, K) bool."""
    height, width = level.shape[2:]
    steps = torch.arange(cells, device=level.device)
    rows, columns = positions[:, 1:] + steps, positions[:, :1] + steps
    has_row, has_column = ((x >= 0) & (x < n) for x, n in ((rows, height), (columns, width)))
    rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
    # Advanced indices around a slice put the patches in front and the channels last.
    image, row, column = images[:, None, None], rows[:, :, None], columns[:, None, :]
    windows = level.permute(0, 2, 3, 1)[image, row, column]
    return windows, has_row[:, :, None] & has_column[:, None, :]


class PatchCompressor(nn.Sequential):
    """From the pyramid's channels to the few that patches are cut from."""

    def __init__(self, channels: int, compressed: int) -> None:
        """Make it for levels of `channels`."""
        super().__init__(
            nn.Conv2d(channels, channels // 2, 1),
            nn.GELU(),
            nn.Conv2d(channels // 2, compressed, 3, padding=1),
        )

    def patches(self, level: Tensor, images: Tensor, positions: Tensor, cells: int) -> Tensor:
        """Patches of the compressed map, which is computed only where they are, if they are few.

        Args:
            level: (B, D, H, W).
            images: (m,) int64.
            positions: (m, 2) x and y of the upper left cells.
            cells: ``K``.

        Returns:
            (m, K * K, C).
        """
        if len(images) * (cells + 2) ** 2 >= level[:, 0].numel():
            return cut_patches(self(level), images, positions, cells)
        first, second = cast(nn.Conv2d, self[0]), cast(nn.Conv2d, self[2])
        windows, inside = _windows(level, images, positions - 1, cells + 2)
        x = self[1](F.linear(windows, first.weight.flatten(1), first.bias))
        x = torch.where(inside.unsqueeze(-1), x, 0.0)  # as the second convolution is padded
        x = F.conv2d(x.permute(0, 3, 1, 2), second.weight, second.bias)
        return torch.where(inside[:, None, 1:-1, 1:-1], x, 0.0).flatten(2).transpose(1, 2)


def from_patches(boxes: Tensor, positions: Tensor, stride: int, cells: int) -> Tensor:
    """Boxes (m, A, 4) cxcywh relative to their patches, in pixels of the images."""
    scaled = boxes * (cells * stride)
    shift = (positions * stride).to(boxes.dtype).unsqueeze(1)
    return torch.cat([scaled[..., :2] + shift, scaled[..., 2:]], dim=-1)
