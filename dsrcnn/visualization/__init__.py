"""Pictures: boxes on images, and curves of a training run."""

from .curves import draw_curves
from .draw import (
    draw_anchors,
    draw_assignment,
    draw_boxes,
    draw_proposals,
    one_below_the_other,
    side_by_side,
)

__all__ = [
    "draw_anchors",
    "draw_assignment",
    "draw_boxes",
    "draw_curves",
    "draw_proposals",
    "one_below_the_other",
    "side_by_side",
]
