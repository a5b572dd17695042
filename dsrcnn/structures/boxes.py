"""Box formats, delta coding and pairwise overlaps."""

import math

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Cast `x` to float32 unless it is float64."""
    return x if x.dtype == torch.float64 else x.float()


# Largest change of log-size in one stage (Sparse R-CNN): a 16-pixel box may grow to 100,000.
MAX_LOG_SCALE = math.log(100_000.0 / 16)
# Divisors of predicted changes of center and size in Sparse R-CNN.
BOX_WEIGHTS = (2.0, 2.0, 1.0, 1.0)


def box_cxcywh_to_xyxy(boxes_cxcywh: Tensor) -> Tensor:
    """Convert center and size (..., 4) to corners."""
    center, size = boxes_cxcywh.split(2, dim=-1)
    return torch.cat([center.sub(size, alpha=0.5), center.add(size, alpha=0.5)], dim=-1)


def box_xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Convert corners (..., 4) to center and size."""
    low, high = boxes.split(2, dim=-1)
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def apply_deltas(
    deltas: Tensor,
    boxes: Tensor,
    weights: tuple[float, float, float, float] = BOX_WEIGHTS,
    max_log_scale: float = MAX_LOG_SCALE,
) -> Tensor:
    """Move and scale `boxes` by predicted `deltas` (Sparse R-CNN's box coder).

    Computed in float32: in half precision a coordinate above 512 has a resolution of half a pixel.

    Args:
        deltas: (..., 4) ``dx, dy, dw, dh``.
        boxes: (..., 4) xyxy in pixels.
        weights: divisors of ``dx, dy, dw, dh``.
        max_log_scale: upper limit of ``dw`` and ``dh`` after the division.

    Returns:
        (..., 4) xyxy, float32 (float64 for float64 input).
    """
    # Both axes at once, numbers instead of tensors, few operations: launches are what counts.
    boxes = at_least_float32(boxes)
    low, high = boxes.split(2, dim=-1)
    move, grow = deltas.to(boxes.dtype).split(2, dim=-1)
    size = high - low
    move, divisor = _divided(move, *weights[:2])
    center = torch.addcmul(low.add(size, alpha=0.5), move, size, value=1 / divisor)
    grow, divisor = _divided(grow, *weights[2:])
    if divisor != 1:
        grow = grow / divisor
    size = grow.clamp(max=max_log_scale).exp() * size
    return torch.cat([center.sub(size, alpha=0.5), center.add(size, alpha=0.5)], dim=-1)


def _divided(pairs: Tensor, first: float, second: float) -> tuple[Tensor, float]:
    """Divide pairs (..., 2) by two numbers, up to the one number that is returned with them."""
    if first == second:
        return pairs, first
    x, y = pairs.split(1, dim=-1)
    return torch.cat([x / first, y / second], dim=-1), 1.0


OVERLAPS = ("iou", "giou", "diou", "ciou")

_SMALLEST_SIDE = 1e-6  # pixels; gives empty boxes an aspect ratio


def pairwise_overlaps(boxes1: Tensor, boxes2: Tensor, kind: str = "giou") -> tuple[Tensor, Tensor]:
    """Compute the IoU of every pair, and a refinement that also separates disjoint boxes.

    Degenerate boxes (no width or height, or corners in the wrong order) count as empty; they give
    finite values and gradients and never raise.

    Args:
        boxes1: (..., P, 4) xyxy.
        boxes2: (..., M, 4) xyxy, same leading axes.
        kind: "iou"; "giou", minus the fraction of the hull that neither covers (arXiv 1902.09630);
            "diou", minus the squared center distance over the squared diagonal of the hull (arXiv
            1911.08287); "ciou", minus a difference of aspect ratios as well (same paper; its
            trade-off factor has no gradient).

    Returns:
        IoU and the refinement, both (..., P, M) and 1 for equal boxes.
    """
    tiny = torch.finfo(boxes1.dtype).tiny
    area1 = (boxes1[..., 2:] - boxes1[..., :2]).clamp(min=0).prod(dim=-1).unsqueeze(-1)
    area2 = (boxes2[..., 2:] - boxes2[..., :2]).clamp(min=0).prod(dim=-1).unsqueeze(-2)
    first, second = boxes1.unsqueeze(-2), boxes2.unsqueeze(-3)
    x1, y1, x2, y2 = first.unbind(-1)
    u1, v1, u2, v2 = second.unbind(-1)
    width = (torch.minimum(x2, u2) - torch.maximum(x1, u1)).clamp(min=0)
    height = (torch.minimum(y2, v2) - torch.maximum(y1, v1)).clamp(min=0)
    intersection = width * height
    union = (area1 + area2 - intersection).clamp(min=tiny)
    iou = intersection / union
    if kind == "iou":
        return iou, iou
    hull_width = (torch.maximum(x2, u2) - torch.minimum(x1, u1)).clamp(min=0)
    hull_height = (torch.maximum(y2, v2) - torch.minimum(y1, v1)).clamp(min=0)
    if kind == "giou":
        hull = (hull_width * hull_height).clamp(min=tiny)
        return iou, iou - (hull - union).clamp(min=0) / hull
    diagonal = (hull_width**2 + hull_height**2).clamp(min=tiny)
    distance = ((x1 + x2 - u1 - u2) / 2) ** 2 + ((y1 + y2 - v1 - v2) / 2) ** 2
    diou = iou - distance / diagonal
    if kind == "diou":
        return iou, diou
    difference = (4 / math.pi**2) * (_aspect_angle(second) - _aspect_angle(first)) ** 2
    with torch.no_grad():
        trade_off = difference / (1 - iou + difference).clamp(min=tiny)
    return iou, diou - trade_off * difference


def _aspect_angle(boxes: Tensor) -> Tensor:
    """Arc tangent of width over height, (..., 4) to (...)."""
    width, height = (boxes[..., 2:] - boxes[..., :2]).clamp(min=_SMALLEST_SIDE).unbind(-1)
    return torch.atan2(width, height)


_EPSILON = 1e-7  # as in AdaMixer's code


def boxes_to_xyzr(boxes: Tensor, *, unit: float = 1.0, ratio_scale: float = 1.0) -> Tensor:
    """Convert xyxy in pixels (..., 4) to AdaMixer's xyzr, in float32 at least.

    It is the center, ``z = log2(sqrt(w h) / unit)`` and ``r = ratio_scale log2(h / w)`` (arXiv
    2203.16507, section 3.2).

    Args:
        boxes: of positive size; empty boxes become very small ones.
        unit: pixels per unit of x, y and the scale.
        ratio_scale: factor of the ratio's logarithm.
    """
    boxes = at_least_float32(boxes) / unit
    low, high = boxes.split(2, dim=-1)
    center, size = (low + high) / 2, (high - low).clamp(min=_EPSILON)
    width, height = size.unbind(-1)
    z = 0.5 * torch.log2(width * height + _EPSILON)
    r = ratio_scale * torch.log2(height / (width + _EPSILON) + _EPSILON)
    return torch.cat([center, z.unsqueeze(-1), r.unsqueeze(-1)], dim=-1)


def xyzr_to_boxes(xyzr: Tensor, *, unit: float = 1.0, ratio_scale: float = 1.0) -> Tensor:
    """Invert `boxes_to_xyzr`; sizes are limited to 2^20 units, so they stay finite."""
    center, z, r = xyzr[..., :2], xyzr[..., 2], xyzr[..., 3] / (2 * ratio_scale)
    size = torch.exp2(torch.stack([z - r, z + r], dim=-1).clamp(max=20.0))
    return torch.cat([center - size / 2, center + size / 2], dim=-1) * unit
