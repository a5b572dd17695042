"""What patches learn in training, and patches that are there to learn (ASAG section 3.2).

Objects are xyxy in pixels of their image unless said otherwise. Letters: ``M`` objects, ``K`` cells
per side of a patch.
"""

import torch
from torch import Tensor
from torchvision.ops import nms

__all__ = [
    "flipped",
    "object_patches",
    "quarter_targets",
    "random_patches",
    "targets_in_patch",
]


def flipped(boxes: Tensor, *, horizontally: bool, vertically: bool) -> Tensor:
    """Boxes (M, 4) cxcywh as shares of an image, in the flipped image.

    (The published code flips them as if they were corners.)
    """
    centres, sizes = boxes.split(2, dim=-1)
    turned = centres.new_tensor([horizontally, vertically]).bool()
    return torch.cat([torch.where(turned, 1 - centres, centres), sizes], dim=-1)


def quarter_targets(boxes: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What each quarter of an image learns.

    Objects belong to the quarters that their centre lies in or on the border of; they are clipped.

    Args:
        boxes: (M, 4) xyxy as shares of the image.

    Returns:
        For the upper left, upper right, lower left and lower right: indices (k,) of objects, and
        their boxes (k, 4) cxcywh as shares of the quarter.
    """
    found = []
    for corner in ((0.0, 0.0), (0.5, 0.0), (0.0, 0.5), (0.5, 0.5)):
        low = boxes.new_tensor(corner)
        found.append(_inside((boxes - low.repeat(2)) * 2))
    return found


def targets_in_patch(
    boxes: Tensor, position: Tensor, stride: int, cells: int
) -> tuple[Tensor, Tensor]:
    """What a patch learns: objects with their centre in it that are not larger, clipped to it.

    Args:
        boxes: (M, 4).
        position: (2,) upper left cell, x and y.
        stride: of the level.
        cells: ``K``.

    Returns:
        Indices (k,) of objects, and their boxes (k, 4) cxcywh as shares of the patch.
    """
    origin = (position * stride).to(boxes.dtype).repeat(2)
    relative = (boxes - origin) / (cells * stride)
    fits = ((relative[:, 2:] - relative[:, :2]) <= 1).all(dim=1)
    index, targets = _inside(relative[fits])
    return fits.nonzero()[:, 0][index], targets


def _inside(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Of boxes (M, 4) xyxy in units of a square: those with their centre in it, clipped, cxcywh."""
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    index = ((centres >= 0) & (centres <= 1)).all(dim=1).nonzero()[:, 0]
    low, high = boxes[index].clamp(0, 1).split(2, dim=1)
    return index, torch.cat([(low + high) / 2, high - low], dim=1)


def object_patches(
    boxes: Tensor, size: Tensor, stride: int, cells: int, threshold: float
) -> Tensor:
    """Patches that hold an object each, at a random place in it.

    Only objects smaller than half a patch have one; of objects that overlap, the most central one.

    Args:
        boxes: (M, 4).
        size: (2,) width and height of the image in pixels.
        stride: of the level.
        cells: ``K``.
        threshold: IoU of objects above which one of them is enough.

    Returns:
        (k, 2) int64 upper left cells, x and y.
    """
    sides = boxes[:, 2:] - boxes[:, :2]
    boxes = boxes[(sides < stride * cells / 2).all(dim=1)]
    if not len(boxes):
        return torch.zeros(0, 2, dtype=torch.int64, device=boxes.device)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    centrality = -torch.cdist(centres, centres).square().sum(dim=1)
    boxes = boxes[nms(boxes, centrality, threshold)]
    first = torch.floor(boxes[:, :2] / stride)
    first = torch.minimum(first, torch.ceil(size / stride) - cells).clamp(min=0)
    slack = (first + cells - torch.ceil(boxes[:, 2:] / stride)).clamp(min=0)
    moved = first - torch.floor(torch.rand_like(slack) * (slack + 1)).clamp(max=slack)
    return moved.clamp(min=0).long()


def random_patches(count: int, size: Tensor, stride: int, cells: int) -> Tensor:
    """`count` patches anywhere in an image of `size` (2,): (count, 2) upper left cells, x and y."""
    room = (torch.ceil(size / stride) - cells).clamp(min=0) + 1
    return torch.floor(torch.rand(count, 2, device=size.device) * room).long()
