"""The nouns that travel between the parts of a detector, and box arithmetic."""

from .boxes import apply_deltas, box_cxcywh_to_xyxy, pairwise_iou_giou
from .types import Predictions, Proposals, Targets

__all__ = [
    "Predictions",
    "Proposals",
    "Targets",
    "apply_deltas",
    "box_cxcywh_to_xyxy",
    "pairwise_iou_giou",
]
