"""The nouns that travel between the parts of a detector, and box arithmetic."""

from .boxes import apply_deltas, box_cxcywh_to_xyxy, box_xyxy_to_cxcywh
from .overlaps import OVERLAPS, pairwise_overlaps
from .precision import at_least_float32
from .processes import each_for_itself, gathered_over_processes, mean_over_processes
from .scale_ratio import boxes_to_xyzr, xyzr_to_boxes
from .types import Predictions, Proposals, Targets, TermWeights

__all__ = [
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
    "each_for_itself",
    "gathered_over_processes",
    "mean_over_processes",
    "pairwise_overlaps",
    "xyzr_to_boxes",
]
