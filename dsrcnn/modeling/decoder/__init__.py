"""The decoder: stages that refine proposals, and the cascade that runs them."""

from .adamixer import AdaMixerDecoder
from .adamixer_stage import AdaMixerStage
from .cascade import Cascade, DynamicHead
from .positional_stage import PositionalStage
from .roi_features import RoIFeatures
from .sparse_stage import RCNNHead

__all__ = [
    "AdaMixerDecoder",
    "AdaMixerStage",
    "Cascade",
    "DynamicHead",
    "PositionalStage",
    "RCNNHead",
    "RoIFeatures",
]
