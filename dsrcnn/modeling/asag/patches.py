"""Patches: windows of 15 x 15 cells, the unit in which ASAG predicts anchors.

ASAG, arXiv 2308.09242, section 3.2. Letters: ``B`` images, ``m`` patches, ``K`` cells per side of a
patch, ``A`` anchors per patch.
"""

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms, nms

from ...structures import box_cxcywh_to_xyxy, box_xyxy_to_cxcywh

__all__ = [
    "Anchors",
    "FixedLevels",
    "Objects",
    "PatchCompressor",
    "PatchLessons",
    "ProbedLevel",
    "ProbingRule",
    "crop_positions",
    "cut_patches",
    "flipped",
    "from_patches",
    "object_patches",
    "objects_in_patches",
    "objects_in_quarters",
    "objects_of_flips",
    "random_patches",
    "rank_in_group",
    "resize_valid",
    "thinned",
]


class ProbingRule(NamedTuple):
    """When anchors are looked at more closely, and which are given out.

    Attributes:
        low: anchors of at least this location score are worth a closer look,
        high: unless they are this good already.
        overlap: IoU of patches above which one of them is enough.
        output: smallest location score that is given out.
        least: anchors of an image, of the fixed levels, whatever their scores.
        most: anchors of an image.
        min_side: of an anchor in pixels; smaller ones have no score.
        max_patches: per image and level; 0 for no limit.
        min_chosen: in inference, an image with fewer anchors worth a look on a level is not probed.
        levels: that are probed: 2, P4 and P3, to 0.
    """

    low: float = 0.1
    high: float = 0.7
    overlap: float = 0.25
    output: float = 0.1
    least: int = 5
    most: int = 200
    min_side: float = 3.0
    max_patches: int = 0
    min_chosen: int = 1
    levels: int = 2


class FixedLevels(NamedTuple):
    """What is predicted for every image.

    Attributes:
        quarters: (B, 4, A, 5) on P5: cxcywh relative to the quarter of the image, location logit.
        whole: (B, 1 or 4, A, 5) on P6, relative to the image; of flipped images in training.
    """

    quarters: Tensor
    whole: Tensor


class ProbedLevel(NamedTuple):
    """What is predicted on the probed patches of a level.

    Attributes:
        predictions: (m, A, 5) cxcywh relative to the patch, location logit.
        images: (m,) int64, the image of each patch.
        positions: (m, 2) upper left cell, x and y.
        stride: of the level.
        spare: (m,) bool, True for patches that are there to learn: nothing is given out.
    """

    predictions: Tensor
    images: Tensor
    positions: Tensor
    stride: int
    spare: Tensor


class Anchors(NamedTuple):
    """Anchors of a batch, padded.

    Attributes:
        boxes: (B, N, 4) cxcywh in pixels; in the padding the whole image.
        scores: (B, N) location scores, 0 in the padding.
        mask: (B, N) bool, False in the padding.
        level: (B, N) int64 of the pyramid: 5 for P5 and P6, 4, or 3; 0 in the padding.
    """

    boxes: Tensor
    scores: Tensor
    mask: Tensor
    level: Tensor


class Objects(NamedTuple):
    """What is to be found.

    Attributes:
        boxes: (R, M, 4) cxcywh as shares of the image or patch.
        labels: (R, M) int64.
        mask: (R, M) bool, False in the padding.
    """

    boxes: Tensor
    labels: Tensor
    mask: Tensor


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
