"""Patches: windows of 15 x 15 cells of a pyramid level, in which ASAG predicts anchors.

Where they are and their content, then, for training, their ground truth and additional ones. ASAG,
arXiv 2308.09242, section 3.2. Notation: ``m`` patches, ``K`` cells per side of a patch, ``A``
anchors per patch. The position of a patch is the x and y of its upper left cell.
"""

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms, nms

from ...structures import Targets, box_cxcywh_to_xyxy, box_xyxy_to_cxcywh

CELLS = 15  # per side of a patch
_OVERLAP = 0.25  # IoU above which one of two patches is redundant
_MAX_WEIGHT = 4.0  # of a ground truth, as published
_MIN_PATCHES = 4  # of an image and level in training, as published


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
    kept: Tensor = batched_nms(squares, scores, images, _OVERLAP)
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


class RelativeTargets(NamedTuple):
    """Ground truth with boxes as fractions of an image or patch.

    Attributes:
        boxes: (B or m, M, 4) cxcywh.
        labels: (B or m, M) int64.
        mask: (B or m, M) bool, False in the padding.
    """

    boxes: Tensor
    labels: Tensor
    mask: Tensor

    @classmethod
    def from_targets(cls, targets: Targets) -> "RelativeTargets":
        """Divide boxes by the image sizes."""
        boxes = box_xyxy_to_cxcywh(targets.boxes) / targets.sizes.unsqueeze(1)
        return cls(boxes, targets.labels, targets.mask)

    def area_weight(self, *, inverse: bool = False) -> Tensor:
        """Weigh ground truths, (B or m, M): 4 for the smallest, 1 for those that fill it all.

        With `inverse`, 1 for the smallest, up to 4 for the largest.
        """
        side = self.boxes[..., 2:].detach().clamp(min=0).prod(dim=-1).sqrt()
        span = _MAX_WEIGHT - 1
        return 1 + span * side if inverse else _MAX_WEIGHT - span * side


_FLIPS = ((False, False), (True, False), (False, True), (True, True))  # x, y
NUM_FLIPS = len(_FLIPS)


def targets_of_flips(targets: RelativeTargets) -> RelativeTargets:
    """Ground truth of P6: everything, in the image and its three flips.

    Returns:
        (4 * B, M): image by image, each as it is, flipped in x, in y, and in both.
    """
    centers, sizes = (x.unsqueeze(1) for x in targets.boxes.split(2, dim=-1))
    flip = torch.tensor(_FLIPS, device=centers.device).view(1, NUM_FLIPS, 1, 2)
    centers = torch.where(flip, 1 - centers, centers)
    boxes = torch.cat([centers, sizes.expand_as(centers)], dim=-1).flatten(0, 1)
    return RelativeTargets(boxes, *(x.repeat_interleave(NUM_FLIPS, dim=0) for x in targets[1:]))


def targets_in_quarters(targets: RelativeTargets) -> RelativeTargets:
    """Ground truth of P5: objects with their center in a quarter of the image or on its border.

    Returns:
        (4 * B, M): image by image, quarters row by row, boxes clipped to the quarter.
    """
    corners = targets.boxes.new_tensor([[0.0, 0.0], [0.5, 0.0], [0.0, 0.5], [0.5, 0.5]])
    centers, sizes = (x.unsqueeze(1) for x in targets.boxes.split(2, dim=-1))
    centers = (centers - corners[None, :, None]) * 2
    boxes = _clip(centers, (sizes * 2).expand_as(centers))
    labels, mask = (x.unsqueeze(1).expand(-1, 4, -1) for x in targets[1:])
    inside = mask & _is_inside(centers)
    return RelativeTargets(boxes.flatten(0, 1), labels.flatten(0, 1), inside.flatten(0, 1))


def targets_in_patches(
    targets: RelativeTargets, sizes: Tensor, images: Tensor, positions: Tensor, stride: int
) -> RelativeTargets:
    """Ground truth of probed patches: objects with their center inside and not larger.

    Args:
        targets: of ``B`` images.
        sizes: (B, 4) ``w, h, w, h`` in pixels.
        images: (m,) int64 image of each patch.
        positions: (m, 2).
        stride: of the level.

    Returns:
        (m, M), boxes clipped to the patch.
    """
    side = CELLS * stride
    pixels = targets.boxes[images] * sizes[images].unsqueeze(1)
    centers = (pixels[..., :2] - (positions * stride).to(pixels.dtype).unsqueeze(1)) / side
    extent = pixels[..., 2:] / side
    fits = targets.mask[images] & _is_inside(centers) & (extent <= 1).all(dim=-1)
    return RelativeTargets(_clip(centers, extent), targets.labels[images], fits)


def _is_inside(centers: Tensor) -> Tensor:
    return ((centers >= 0) & (centers <= 1)).all(dim=-1)


def _clip(centers: Tensor, sizes: Tensor) -> Tensor:
    """Clip boxes to the unit square; returns cxcywh."""
    corners = box_cxcywh_to_xyxy(torch.cat([centers, sizes], dim=-1))
    return box_xyxy_to_cxcywh(corners.clamp(0, 1))


def object_patches(boxes: Tensor, size: Tensor, stride: int) -> Tensor:
    """Place a patch around each small object, with the object at a random place inside.

    Objects larger than half a patch get none; of overlapping objects the most central one has it.

    Args:
        boxes: (M, 4) xyxy in pixels.
        size: (2,) width and height of the image in pixels.
        stride: of the level.

    Returns:
        Positions (k, 2), k <= M.
    """
    sides = boxes[:, 2:] - boxes[:, :2]
    boxes = boxes[(sides < stride * CELLS / 2).all(dim=1)]
    if not len(boxes):
        return torch.zeros(0, 2, dtype=torch.int64, device=boxes.device)
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2
    centrality = -torch.cdist(centers, centers).square().sum(dim=1)
    boxes = boxes[nms(boxes, centrality, _OVERLAP)]  # objects, not patches, as published
    first = torch.floor(boxes[:, :2] / stride)
    first = torch.minimum(first, torch.ceil(size / stride) - CELLS).clamp(min=0)
    slack = (first + CELLS - torch.ceil(boxes[:, 2:] / stride)).clamp(min=0)
    moved = first - torch.floor(torch.rand_like(slack) * (slack + 1)).clamp(max=slack)
    return moved.clamp(min=0).long()


def random_patches(count: int, size: Tensor, stride: int) -> Tensor:
    """Draw `count` positions (count, 2) in an image of `size` (2,) in pixels."""
    room = (torch.ceil(size / stride) - CELLS).clamp(min=0) + 1
    return torch.floor(torch.rand(count, 2, device=size.device) * room).long()


class TrainingPatches(NamedTuple):
    """Add patches in training, so that every image trains every level.

    Attributes:
        boxes: ground-truth boxes (M_i, 4) of each image, xyxy in pixels.
        sizes: (B, 4) ``w, h, w, h`` in pixels.
        guided: probe around ground truths, not around the anchors of an untrained generator.
    """

    boxes: list[Tensor]
    sizes: Tensor
    guided: bool = False

    def complete(
        self, images: Tensor, positions: Tensor, stride: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Add patches, around ground truths and then at random, until every image has four.

        Those have losses only. When `guided`, all around ground truths are added, with output.

        Args:
            images: (m,) int64 image of each patch selected by the generator.
            positions: (m, 2).
            stride: of the level.

        Returns:
            Images and positions, the given ones first, and bools, True for patches that have
            losses but whose anchors are not output.
        """
        counts = images.bincount(minlength=len(self.boxes)).tolist()
        all_images, all_positions = [images], [positions]
        train_only = [torch.zeros_like(images, dtype=torch.bool)]
        for image, boxes in enumerate(self.boxes):
            size = self.sizes[image, :2]
            around = object_patches(boxes, size, stride)
            missing = _MIN_PATCHES - counts[image] - (len(around) if self.guided else 0)
            missing = max(missing, 0)
            if not self.guided:
                around = around[torch.randperm(len(around), device=around.device)[:missing]]
                missing -= len(around)
            added = torch.cat([around, random_patches(missing, size, stride)])
            all_images.append(images.new_full((len(added),), image))
            all_positions.append(added)
            is_random = torch.arange(len(added), device=added.device) >= len(around)
            train_only.append(is_random if self.guided else torch.ones_like(is_random))
        return torch.cat(all_images), torch.cat(all_positions), torch.cat(train_only)
