"""Position-aware self-attention (AdaMixer, arXiv 2203.16507, section 3.4)."""

import torch
from torch import Tensor, nn

_TEMPERATURE = 10_000.0
_SCALES = (1000.0, 1000.0, 1.0, 1.0)  # divisors of x, y, z and r


def encode_by_waves(values: Tensor, channels: int) -> Tensor:
    """Encode each of n values, (..., n), by sines and cosines of `channels` wavelengths.

    Returns (..., n * channels), value by value; `channels` is even.
    """
    index = torch.arange(channels, device=values.device)
    wavelength = _TEMPERATURE ** (2 * (index // 2) / channels)
    angles = values.unsqueeze(-1) / wavelength.to(values.dtype)
    return torch.where(index % 2 == 0, angles.sin(), angles.cos()).flatten(-2)


def encode_positions(xyzr: Tensor, channels: int) -> Tensor:
    """Encode positions by sines and cosines, a quarter of the channels per coordinate.

    From (..., 4), see `dsrcnn.structures.boxes_to_xyzr`, to (..., channels) without gradient;
    `channels` is a multiple of 8.
    """
    coordinates = zip(xyzr.detach().unbind(-1), _SCALES, strict=True)
    return encode_by_waves(torch.stack([x / scale for x, scale in coordinates], -1), channels // 4)


def intersections_over_foreground(boxes: Tensor) -> Tensor:
    """Divide intersections (i, j) by the area of i: (..., P, 4) xyxy to (..., P, P)."""
    low = torch.maximum(boxes[..., :, None, :2], boxes[..., None, :, :2])
    high = torch.minimum(boxes[..., :, None, 2:], boxes[..., None, :, 2:])
    common = (high - low).clamp(min=0).prod(dim=-1)
    area = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(dim=-1)
    return common / area.clamp(min=1e-6).unsqueeze(-1)


class RelationAttention(nn.Module):
    """Self-attention with encoded positions and a learned factor per head for overlaps.

    Attributes:
        iof_tau: (heads,) factors of the logarithm of overlaps.
    """

    def __init__(self, channels: int, heads: int) -> None:
        """Build it for features of `channels`, a multiple of 8 and of `heads`."""
        super().__init__()
        self.heads = heads
        self.attention = nn.MultiheadAttention(channels, heads, batch_first=True)
        self.norm = nn.LayerNorm(channels)
        self.iof_tau = nn.Parameter(torch.empty(heads))
        self.initialize()

    def initialize(self) -> None:
        """Draw the factors uniformly between 0 and 4."""
        nn.init.uniform_(self.iof_tau, 0.0, 4.0)

    def forward(
        self, features: Tensor, xyzr: Tensor, boxes: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Attend among the proposals of each image or group.

        Args:
            features: (B, P, D), as the result.
            xyzr: (B, P, 4) positions.
            boxes: (B, P, 4) the same as xyxy.
            mask: (B, P) or (B, P, P) bool, False for keys to ignore.
        """
        x = features + encode_positions(xyzr, features.shape[-1]).to(features.dtype)
        overlaps = torch.log(intersections_over_foreground(boxes.detach()) + 1e-7)
        bias = self.iof_tau.view(1, -1, 1, 1) * overlaps.unsqueeze(1)
        if mask is not None:
            mask = mask if mask.dim() == 3 else mask.unsqueeze(1)
            bias = bias.masked_fill(~mask.unsqueeze(1), float("-inf"))
        bias = bias.flatten(0, 1).to(x.dtype)
        attended = self.attention(x, x, x, attn_mask=bias, need_weights=False)[0]
        result: Tensor = self.norm(x + attended)
        return result
