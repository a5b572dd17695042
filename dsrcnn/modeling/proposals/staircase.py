"""The staircase of DPG (arXiv 2205.02101, section 3.2): a feature pyramid to one map per image."""

import torch
import torch.nn.functional as F
from detectron2.layers import get_norm
from torch import Tensor, nn


class StairStep(nn.Module):
    """Depth-wise 3x3 convolution of stride 2, norm and ReLU."""

    def __init__(self, channels: int, norm: str) -> None:
        """Build the layers; `norm` is BN, SyncBN, FrozenBN, GN or "none"."""
        super().__init__()
        self.conv = nn.Conv2d(
            channels, channels, 3, stride=2, padding=1, groups=channels, bias=norm == "none"
        )
        self.norm = nn.Identity() if norm == "none" else get_norm(norm, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) to (B, channels, H / 2, W / 2)."""
        return F.relu(self.norm(self.conv(x)))


def fuse_levels(features: list[Tensor], steps: nn.ModuleList) -> Tensor:
    """Downsample the finest level, concatenate the next one, downsample both, and so on.

    Args:
        features: levels (B, D, H_l, W_l), finest first, each half the size of the one before.
        steps: one `StairStep` per level but the last, of D, 2 D, ... channels.

    Returns:
        (B, L D, H, W) at the size of the last level.
    """
    x = features[0]
    for step, level in zip(steps, features[1:], strict=True):
        x = torch.cat([step(x), level], dim=1)
    return x


def resize_nearest(maps: Tensor, size: int, valid: Tensor) -> Tensor:
    """Resize the valid part of maps to squares by nearest neighbor.

    Args:
        maps: (B, H, W).
        size: side of the square.
        valid: (B, 2) height and width of the image in the top left corner; the rest, padding of the
            batch, is left out.

    Returns:
        (B, size, size).
    """
    index = torch.arange(size, device=maps.device)
    rows, columns = (index * extent.unsqueeze(-1) // size for extent in valid.unbind(-1))
    image = torch.arange(maps.shape[0], device=maps.device).view(-1, 1, 1)
    return maps[image, rows.unsqueeze(2), columns.unsqueeze(1)]
