"""AdaMixer's box format: centre, logarithm of the scale, logarithm of the aspect ratio.

``z = log2(sqrt(w h) / unit)`` and ``r = ratio_scale log2(h / w)`` (arXiv 2203.16507, section 3.2).
A change of z or r by one doubles the scale or, by its scale, the ratio.
"""

import torch
from torch import Tensor

from .precision import at_least_float32

__all__ = ["boxes_to_xyzr", "xyzr_to_boxes"]

_EPSILON = 1e-7  # of the published code


def boxes_to_xyzr(boxes: Tensor, *, unit: float = 1.0, ratio_scale: float = 1.0) -> Tensor:
    """From xyxy in pixels (..., 4) to xyzr, in float32 at least.

    Args:
        boxes: of positive size; others become very small ones.
        unit: pixels that x, y and the scale are measured in.
        ratio_scale: factor of the ratio's logarithm.
    """
    boxes = at_least_float32(boxes) / unit
    low, high = boxes.split(2, dim=-1)
    centre, size = (low + high) / 2, (high - low).clamp(min=_EPSILON)
    width, height = size.unbind(-1)
    z = 0.5 * torch.log2(width * height + _EPSILON)
    r = ratio_scale * torch.log2(height / (width + _EPSILON) + _EPSILON)
    return torch.cat([centre, z.unsqueeze(-1), r.unsqueeze(-1)], dim=-1)


def xyzr_to_boxes(xyzr: Tensor, *, unit: float = 1.0, ratio_scale: float = 1.0) -> Tensor:
    """The inverse of `boxes_to_xyzr`; sizes are limited to 2^20 units, so they stay finite."""
    centre, z, r = xyzr[..., :2], xyzr[..., 2], xyzr[..., 3] / (2 * ratio_scale)
    size = torch.exp2(torch.stack([z - r, z + r], dim=-1).clamp(max=20.0))
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1) * unit
