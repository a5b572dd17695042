"""Box formats and the delta coding of the cascade."""

import math

import torch
from torch import Tensor

from .precision import at_least_float32

__all__ = ["MAX_LOG_SCALE", "apply_deltas", "box_cxcywh_to_xyxy", "box_xyxy_to_cxcywh"]

# Largest change of log-size in one stage, of Sparse R-CNN: a 16-pixel box may grow to 100,000.
MAX_LOG_SCALE = math.log(100_000.0 / 16)


def box_cxcywh_to_xyxy(boxes_cxcywh: Tensor) -> Tensor:
    """Corners of boxes given by centre and size, (..., 4) to (..., 4)."""
    centre, size = boxes_cxcywh.split(2, dim=-1)
    return torch.cat([centre - 0.5 * size, centre + 0.5 * size], dim=-1)


def box_xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Centre and size of boxes given by their corners, (..., 4) to (..., 4)."""
    low, high = boxes.split(2, dim=-1)
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def apply_deltas(
    deltas: Tensor,
    boxes: Tensor,
    weights: tuple[float, float, float, float] = (2.0, 2.0, 1.0, 1.0),
    max_log_scale: float = MAX_LOG_SCALE,
) -> Tensor:
    """Move and scale `boxes` by predicted `deltas` (Sparse R-CNN's box coder).

    Computed in float32: in half precision a coordinate above 512 has a resolution of half a pixel.

    Args:
        deltas: (..., 4) ``dx, dy, dw, dh``.
        boxes: (..., 4) xyxy in pixels.
        weights: divisors of the four deltas.
        max_log_scale: upper limit of ``dw`` and ``dh`` after the division.

    Returns:
        (..., 4) xyxy, float32 (float64 for float64 input).
    """
    boxes = at_least_float32(boxes)
    x1, y1, x2, y2 = boxes.unbind(-1)
    # Divided one by one: a tensor of weights would cost a transfer to the device in every stage.
    dx, dy, dw, dh = (
        d / w for d, w in zip(deltas.to(boxes.dtype).unbind(-1), weights, strict=True)
    )
    width, height = x2 - x1, y2 - y1
    centre_x = dx * width + (x1 + 0.5 * width)
    centre_y = dy * height + (y1 + 0.5 * height)
    half_width = 0.5 * dw.clamp(max=max_log_scale).exp() * width
    half_height = 0.5 * dh.clamp(max=max_log_scale).exp() * height
    return torch.stack(
        [
            centre_x - half_width,
            centre_y - half_height,
            centre_x + half_width,
            centre_y + half_height,
        ],
        dim=-1,
    )
