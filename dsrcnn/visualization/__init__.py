"""Pictures: boxes on images, and curves of a training run."""

from .anchors import draw_anchors
from .assignment import draw_assignment
from .curves import draw_curves
from .draw import draw_boxes, one_below_the_other, side_by_side
from .proposals import draw_expert_weights, draw_proposals
from .results import draw_results

__all__ = [
    "draw_anchors",
    "draw_assignment",
    "draw_boxes",
    "draw_curves",
    "draw_expert_weights",
    "draw_proposals",
    "draw_results",
    "one_below_the_other",
    "side_by_side",
]
