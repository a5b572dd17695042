"""Training of ASAG's patches: additional patches, and the ground truth of every patch.

ASAG, arXiv 2308.09242, section 3.2. Notation: ``m`` patches, ``R`` images or patches.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import nms

from ...structures import Targets, box_cxcywh_to_xyxy, box_xyxy_to_cxcywh
from .patches import CELLS, PATCH_OVERLAP

_MAX_WEIGHT = 4.0  # as published


class RelativeTargets(NamedTuple):
    """Ground truth with boxes as fractions of an image or patch.

    Attributes:
        boxes: (R, M, 4) cxcywh.
        labels: (R, M) int64.
        mask: (R, M) bool, False in the padding.
    """

    boxes: Tensor
    labels: Tensor
    mask: Tensor

    @classmethod
    def from_targets(cls, targets: Targets) -> "RelativeTargets":
        """Divide boxes by the image sizes; ``R`` is ``B``."""
        boxes = box_xyxy_to_cxcywh(targets.boxes) / targets.sizes.unsqueeze(1)
        return cls(boxes, targets.labels, targets.mask)

    def area_weight(self, *, inverse: bool = False) -> Tensor:
        """Weights (R, M): 4 for the smallest ground truths, down to 1 for those that fill it all.

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
    boxes = boxes[nms(boxes, centrality, PATCH_OVERLAP)]  # objects, not patches, as published
    first = torch.floor(boxes[:, :2] / stride)
    first = torch.minimum(first, torch.ceil(size / stride) - CELLS).clamp(min=0)
    slack = (first + CELLS - torch.ceil(boxes[:, 2:] / stride)).clamp(min=0)
    moved = first - torch.floor(torch.rand_like(slack) * (slack + 1)).clamp(max=slack)
    return moved.clamp(min=0).long()


def random_patches(count: int, size: Tensor, stride: int) -> Tensor:
    """Draw `count` positions (count, 2) in an image of `size` (2,) in pixels."""
    room = (torch.ceil(size / stride) - CELLS).clamp(min=0) + 1
    return torch.floor(torch.rand(count, 2, device=size.device) * room).long()


_MIN_PATCHES = 4  # of an image and level in training, as published


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
