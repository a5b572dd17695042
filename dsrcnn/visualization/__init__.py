"""Pictures: boxes on images, and curves of a training run."""

from .curves import draw_curves
from .draw import draw_boxes, side_by_side

__all__ = ["draw_boxes", "draw_curves", "side_by_side"]
