"""ROI heads of Faster R-CNN that follow their proposals (Dynamic R-CNN)."""

from .dynamic_roi_heads import DynamicROIHeads

__all__ = ["DynamicROIHeads"]
