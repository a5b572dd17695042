"""ROI heads for Detectron2's Faster R-CNN; importing it registers them."""

from .dynamic_roi_heads import DynamicROIHeads

__all__ = ["DynamicROIHeads"]
