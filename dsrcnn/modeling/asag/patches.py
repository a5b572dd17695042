"""Patches: windows of 15 x 15 cells, the unit in which ASAG predicts anchors.

ASAG, arXiv 2308.09242, section 3.2. Letters: ``B`` images, ``m`` patches, ``K`` cells per side of a
patch, ``A`` anchors per patch.
"""

import torch
from torch import Tensor
from torchvision.ops import batched_nms

__all__ = ["crop_positions", "cut_patches", "from_patches", "thinned"]


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
    squares = torch.cat([centres - side / 2, centres + side / 2], dim=1)
    kept: Tensor = batched_nms(squares, scores, images, threshold)
    return kept


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
    height, width = level.shape[2:]
    missing = (0, max(cells - width, 0), 0, max(cells - height, 0))
    level = torch.nn.functional.pad(level, missing) if any(missing) else level
    steps = torch.arange(cells, device=level.device)
    rows = (positions[:, 1:] + steps)[:, :, None]
    columns = (positions[:, :1] + steps)[:, None, :]
    # Advanced indices around a slice put the patches in front and the channels last.
    return level.permute(0, 2, 3, 1)[images[:, None, None], rows, columns].flatten(1, 2)


def from_patches(boxes: Tensor, positions: Tensor, stride: int, cells: int) -> Tensor:
    """Boxes (m, A, 4) cxcywh relative to their patches, in pixels of the images."""
    scaled = boxes * (cells * stride)
    shift = (positions * stride).to(boxes.dtype).unsqueeze(1)
    return torch.cat([scaled[..., :2] + shift, scaled[..., 2:]], dim=-1)
