"""The decoder: stages that refine proposals, and the cascade that runs them."""

from .adamixer import AdaMixerDecoder, AdaMixerStage, PositionalStage
from .cascade import Cascade, DynamicHead
from .deformable import DeformableDecoder, DeformableStage
from .rcnn_head import RCNNHead, RoIFeatures, Stage, StageSettings, stride_of

__all__ = [
    "AdaMixerDecoder",
    "AdaMixerStage",
    "Cascade",
    "DeformableDecoder",
    "DeformableStage",
    "DynamicHead",
    "PositionalStage",
    "RCNNHead",
    "RoIFeatures",
    "Stage",
    "StageSettings",
    "stride_of",
]
