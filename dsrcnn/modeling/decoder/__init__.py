"""The decoder: stages that refine proposals, and the cascade that runs them."""

from .cascade import DynamicHead
from .roi_features import RoIFeatures
from .sparse_stage import RCNNHead

__all__ = ["DynamicHead", "RCNNHead", "RoIFeatures"]
