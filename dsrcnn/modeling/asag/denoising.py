"""Denoising queries: objects with noise on their boxes, to be put right (ASAG-A-dn, after DN-DETR).

They stand in front of the anchors, in training only, and no query that is used later sees them.
Letters: ``B`` images, ``n`` denoising queries, ``M`` objects (padded), ``N`` anchors (padded).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .anchors import Objects

__all__ = ["NoisyQueries", "denoising_mask", "noisy_queries"]


class NoisyQueries(NamedTuple):
    """Objects over and over, each time with other noise.

    Attributes:
        boxes: (B, n, 4) cxcywh as shares of the image; in the padding the whole image.
        assignment: (B, n) int64, index of the object, -1 in the padding.
        group: (B, n) int64, the repetition; padding is a group of its own, -1.
    """

    boxes: Tensor
    assignment: Tensor
    group: Tensor


def noisy_queries(objects: Objects, count: int, noise: float) -> NoisyQueries:
    """Repeat the objects of every image as often as `count` queries allow.

    Args:
        objects: (B, M), boxes as shares of the image.
        count: ``n``. An image without objects, or with more, has padding alone.
        noise: how far a centre may move, in halves of the box, and a side change, in sides.
    """
    images, device = len(objects.mask), objects.mask.device
    number = objects.mask.sum(dim=1, keepdim=True)
    slot = torch.arange(count, device=device).expand(images, -1)
    index, group = slot % number.clamp(min=1), slot // number.clamp(min=1)
    # Objects stand before their padding; a last, incomplete repetition is left out.
    real = (number > 0) & (group < count // number.clamp(min=1))
    whole = objects.boxes.new_tensor([0.5, 0.5, 1.0, 1.0])
    if not objects.mask.shape[1]:
        boxes = whole.expand(images, count, 4)
    else:
        clean = objects.boxes.take_along_dim(index.unsqueeze(-1), dim=1)
        reach = torch.cat([clean[..., 2:] / 2, clean[..., 2:]], dim=-1) * noise
        moved = (clean + (2 * torch.rand_like(clean) - 1) * reach).clamp(0, 1)
        boxes = torch.where(real.unsqueeze(-1), moved, whole)
    return NoisyQueries(boxes, index.masked_fill(~real, -1), group.masked_fill(~real, -1))


def denoising_mask(group: Tensor, valid: Tensor) -> Tensor:
    """Who may attend to whom: (B, n + N, n + N) bool.

    Denoising queries see their repetition and the valid anchors, anchors see each other alone.
    Padding among the anchors is seen by itself only.

    Args:
        group: (B, n), see `NoisyQueries`.
        valid: (B, N) bool, False for padding.
    """
    count, anchors = group.shape[1], valid.shape[1]
    same = group.unsqueeze(2) == group.unsqueeze(1)
    above = torch.cat([same, valid.unsqueeze(1).expand(-1, count, -1)], dim=2)
    itself = torch.eye(anchors, dtype=torch.bool, device=valid.device)
    among = valid.unsqueeze(1) | itself
    below = torch.cat([among.new_zeros(len(valid), anchors, count), among], dim=2)
    return torch.cat([above, below], dim=1)
