"""Data structures that the parts of a detector exchange, and box arithmetic."""

from .boxes import (
    BOX_WEIGHTS,
    MAX_LOG_SCALE,
    OVERLAPS,
    apply_deltas,
    at_least_float32,
    box_cxcywh_to_xyxy,
    box_xyxy_to_cxcywh,
    boxes_to_xyzr,
    pairwise_overlaps,
    xyzr_to_boxes,
)
from .types import Predictions, Proposals, Targets, TermWeights

__all__ = [
    "BOX_WEIGHTS",
    "MAX_LOG_SCALE",
    "OVERLAPS",
    "Predictions",
    "Proposals",
    "Targets",
    "TermWeights",
    "apply_deltas",
    "at_least_float32",
    "box_cxcywh_to_xyxy",
    "box_xyxy_to_cxcywh",
    "boxes_to_xyzr",
    "pairwise_overlaps",
    "xyzr_to_boxes",
]
