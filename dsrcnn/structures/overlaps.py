"""How well boxes overlap, pairwise over any leading axes: IoU and its three refinements."""

import math

import torch
from torch import Tensor

__all__ = ["OVERLAPS", "pairwise_overlaps"]

OVERLAPS = ("iou", "giou", "diou", "ciou")

_SMALLEST_SIDE = 1e-6  # pixels; of a box without width or height, which has no aspect ratio


def pairwise_overlaps(boxes1: Tensor, boxes2: Tensor, kind: str = "giou") -> tuple[Tensor, Tensor]:
    """IoU of every pair, and a measure that tells boxes apart where IoU does not.

    Degenerate boxes (no width or height, or corners in the wrong order) count as empty; they give
    finite values and gradients and never raise.

    Args:
        boxes1: (..., P, 4) xyxy.
        boxes2: (..., M, 4) xyxy, same leading axes.
        kind: "iou"; "giou", less the share of the hull that neither covers (arXiv 1902.09630);
            "diou", less the squared distance of the centres by the squared diagonal of the hull
            (arXiv 1911.08287); "ciou", less a difference of aspect ratios on top (same paper,
            whose trade-off factor has no gradient).

    Returns:
        IoU and the measure, both (..., P, M). Both are 1 for equal boxes and at most 1.
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
    """Arc tangent of width by height, (..., 4) to (...)."""
    width, height = (boxes[..., 2:] - boxes[..., :2]).clamp(min=_SMALLEST_SIDE).unbind(-1)
    return torch.atan2(width, height)
