"""What patches learn in training, and patches that are there to learn (ASAG section 3.2).

Letters: ``B`` images, ``M`` objects (padded), ``m`` patches, ``K`` cells per side of a patch.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import nms

from ...structures import box_cxcywh_to_xyxy, box_xyxy_to_cxcywh
from .anchors import Objects

__all__ = [
    "PatchLessons",
    "flipped",
    "object_patches",
    "objects_in_patches",
    "objects_in_quarters",
    "objects_of_flips",
    "random_patches",
]

_FLIPS = ((False, False), (True, False), (False, True), (True, True))  # across, upside down


def flipped(boxes: Tensor, *, horizontally: bool, vertically: bool) -> Tensor:
    """Boxes (..., 4) cxcywh as shares of an image, in the flipped image."""
    centres, sizes = boxes.split(2, dim=-1)
    turned = torch.tensor([horizontally, vertically], device=boxes.device)
    return torch.cat([torch.where(turned, 1 - centres, centres), sizes], dim=-1)


def _flipped_as_corners(boxes: Tensor, *, horizontally: bool, vertically: bool) -> Tensor:
    """What the published code does to boxes cxcywh: it takes them for corners."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    if horizontally:
        x1, x2 = 1 - x2, 1 - x1
    if vertically:
        y1, y2 = 1 - y2, 1 - y1
    return torch.stack([x1, y1, x2, y2], dim=-1)


def objects_of_flips(objects: Objects, *, as_corners: bool = False) -> Objects:
    """What P6 learns: all objects, of the image and of the image flipped three ways.

    Args:
        objects: (B, M), boxes as shares of the image.
        as_corners: flip boxes as the published code does, which is wrong.

    Returns:
        (4 * B, M): image after image, each as it is, flipped across, upside down, and both.
    """
    flip = _flipped_as_corners if as_corners else flipped
    ways = [flip(objects.boxes, horizontally=h, vertically=v) for h, v in _FLIPS]
    boxes = torch.stack(ways, dim=1).flatten(0, 1)
    return Objects(boxes, *(x.repeat_interleave(len(_FLIPS), dim=0) for x in objects[1:]))


def objects_in_quarters(objects: Objects) -> Objects:
    """What P5 learns: objects belong to the quarters that their centre is in or on the border of.

    Args:
        objects: (B, M), boxes as shares of the image.

    Returns:
        (4 * B, M): image after image, each from the upper left to the lower right, boxes clipped
        to their quarter and as shares of it.
    """
    corners = objects.boxes.new_tensor([[0.0, 0.0], [0.5, 0.0], [0.0, 0.5], [0.5, 0.5]])
    centres, sizes = (x.unsqueeze(1) for x in objects.boxes.split(2, dim=-1))
    centres = (centres - corners[None, :, None]) * 2
    found = _clipped(centres, (sizes * 2).expand_as(centres))
    labels, mask = (x.unsqueeze(1).expand(-1, 4, -1) for x in objects[1:])
    inside = mask & _is_inside(centres)
    return Objects(found.flatten(0, 1), labels.flatten(0, 1), inside.flatten(0, 1))


def objects_in_patches(
    objects: Objects, sizes: Tensor, images: Tensor, positions: Tensor, stride: int, cells: int
) -> Objects:
    """What patches of a level learn: objects with their centre in it that are not larger.

    Args:
        objects: (B, M), boxes as shares of the image.
        sizes: (B, 4) ``w, h, w, h`` in pixels.
        images: (m,) int64, the image of each patch.
        positions: (m, 2) upper left cell, x and y.
        stride: of the level.
        cells: ``K``.

    Returns:
        (m, M), boxes clipped to their patch and as shares of it.
    """
    side = cells * stride
    pixels = objects.boxes[images] * sizes[images].unsqueeze(1)
    centres = (pixels[..., :2] - (positions * stride).to(pixels.dtype).unsqueeze(1)) / side
    extent = pixels[..., 2:] / side
    fits = objects.mask[images] & _is_inside(centres) & (extent <= 1).all(dim=-1)
    return Objects(_clipped(centres, extent), objects.labels[images], fits)


def _is_inside(centres: Tensor) -> Tensor:
    return ((centres >= 0) & (centres <= 1)).all(dim=-1)


def _clipped(centres: Tensor, sizes: Tensor) -> Tensor:
    """Boxes cxcywh of what lies in the unit square."""
    corners = box_cxcywh_to_xyxy(torch.cat([centres, sizes], dim=-1))
    return box_xyxy_to_cxcywh(corners.clamp(0, 1))


def object_patches(
    boxes: Tensor, size: Tensor, stride: int, cells: int, threshold: float
) -> Tensor:
    """Patches that hold an object each, at a random place in it.

    Only objects smaller than half a patch have one; of objects that overlap, the most central one.

    Args:
        boxes: (M, 4) xyxy in pixels.
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


class PatchLessons(NamedTuple):
    """Sees to it that every image has patches to learn from on every level.

    Attributes:
        boxes: of each image's objects (M_i, 4), xyxy in pixels.
        sizes: (B, 4) ``w, h, w, h`` in pixels.
        least: patches of an image and level.
        threshold: see `object_patches`.
        guided: patches around objects are used like those that probing chooses, and probing, which
            knows nothing yet, chooses none.
    """

    boxes: list[Tensor]
    sizes: Tensor
    least: int = 4
    threshold: float = 0.25
    guided: bool = False

    def complete(
        self, images: Tensor, positions: Tensor, stride: int, cells: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Add patches to those of a level.

        Args:
            images: (m,) int64, the image of each patch that probing chose.
            positions: (m, 2) upper left cell, x and y.
            stride: of the level.
            cells: ``K``.

        Returns:
            Images (n,), positions (n, 2), and (n,) bool, True for patches whose anchors are
            learned from and not given out.
        """
        counts = images.bincount(minlength=len(self.boxes)).tolist()
        owners, places, spare = [images], [positions], [torch.zeros_like(images, dtype=torch.bool)]
        for image, boxes in enumerate(self.boxes):
            size = self.sizes[image, :2]
            around = object_patches(boxes, size, stride, cells, self.threshold)
            missing = max(self.least - counts[image] - (len(around) if self.guided else 0), 0)
            if not self.guided:
                around = around[torch.randperm(len(around), device=around.device)[:missing]]
                missing -= len(around)
            added = torch.cat([around, random_patches(missing, size, stride, cells)])
            places.append(added)
            owners.append(images.new_full((len(added),), image))
            used = torch.arange(len(added), device=added.device) < len(around)
            spare.append(~used if self.guided else torch.ones_like(used))
        return torch.cat(owners), torch.cat(places), torch.cat(spare)
