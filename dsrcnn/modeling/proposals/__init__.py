"""Where proposals come from."""

from detectron2.config import CfgNode
from torch import nn

from .dynamic import DynamicProposals
from .initial_boxes import INITIAL_BOXES, initial_boxes
from .learned import PROPOSALS_REGISTRY, LearnedProposals
from .mixing_statistics import mixing_statistics
from .temperature import TemperatureSchedule

__all__ = [
    "INITIAL_BOXES",
    "PROPOSALS_REGISTRY",
    "DynamicProposals",
    "LearnedProposals",
    "TemperatureSchedule",
    "build_proposals",
    "initial_boxes",
    "mixing_statistics",
]


def build_proposals(cfg: CfgNode) -> nn.Module:
    """Learned proposals, or with ``MODEL.SparseRCNN.DPG.ENABLED`` those mixed for each image."""
    name = "DynamicProposals" if cfg.MODEL.SparseRCNN.DPG.ENABLED else "LearnedProposals"
    source: nn.Module = PROPOSALS_REGISTRY.get(name)(cfg)
    return source
