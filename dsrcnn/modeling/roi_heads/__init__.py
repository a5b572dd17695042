"""ROI heads of Faster R-CNN that follow their proposals (Dynamic R-CNN)."""

from .dynamic_roi_heads import DynamicROIHeads
from .training_stats import DynamicTrainingStats

__all__ = ["DynamicROIHeads", "DynamicTrainingStats"]
