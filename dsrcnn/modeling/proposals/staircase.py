"""The staircase of DPG: from a feature pyramid to one small map per image.

Dynamic Sparse R-CNN, arXiv 2205.02101, section 3.2. Letters: ``B`` images, ``D`` channels of a
level, ``L`` levels.
"""

import torch
import torch.nn.functional as F
from detectron2.layers import get_norm
from torch import Tensor, nn

from ...structures import at_least_float32

__all__ = ["StairStep", "climb", "resize_nearest", "summarize"]


class StairStep(nn.Module):
    """Halves a map by a depth-wise 3x3 convolution, then norm and ReLU."""

    def __init__(self, channels: int, norm: str) -> None:
        """Set the width.

        Args:
            channels: in and out.
            norm: a name that Detectron2 knows (BN, SyncBN, FrozenBN, GN), or "none".
        """
        super().__init__()
        self.conv = nn.Conv2d(
            channels, channels, 3, stride=2, padding=1, groups=channels, bias=norm == "none"
        )
        self.norm = nn.Identity() if norm == "none" else get_norm(norm, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) to (B, channels, H / 2, W / 2)."""
        return F.relu(self.norm(self.conv(x)))


def climb(features: list[Tensor], steps: nn.ModuleList) -> Tensor:
    """Halve the finest level, put the next one beside it, halve both, and so on.

    Args:
        features: levels (B, D, H_l, W_l), finest first, each half as large as the one before.
        steps: one `StairStep` per level but the last, of D, 2 D, ... channels.

    Returns:
        (B, L D, H, W) at the size of the last level.
    """
    x = features[0]
    for step, level in zip(steps, features[1:], strict=True):
        x = torch.cat([step(x), level], dim=1)
    return x


def resize_nearest(maps: Tensor, size: int, valid: Tensor | None = None) -> Tensor:
    """Stretch maps to squares; nearest neighbour.

    Args:
        maps: (B, H, W).
        size: side of the square.
        valid: (B, 2) height and width of the part that is the image, at the top left; the rest is
            padding of the batch and left out. None takes the whole map.

    Returns:
        (B, size, size).
    """
    index = torch.arange(size, device=maps.device)
    if valid is None:
        rows, columns = (index * extent // size for extent in maps.shape[1:])
        return maps[:, rows.unsqueeze(1), columns]
    rows, columns = (index * extent.unsqueeze(-1) // size for extent in valid.unbind(-1))
    image = torch.arange(len(maps), device=maps.device).view(-1, 1, 1)
    return maps[image, rows.unsqueeze(2), columns.unsqueeze(1)]


def summarize(features: Tensor, reduce: str) -> Tensor:
    """Sum or mean over channels, in float32: (B, C, H, W) to (B, H, W).

    The sum of a thousand channels leaves the range of half precision.
    """
    features = at_least_float32(features)
    return features.sum(dim=1) if reduce == "sum" else features.mean(dim=1)
