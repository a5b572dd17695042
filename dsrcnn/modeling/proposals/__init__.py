"""Where proposals come from."""

from detectron2.config import CfgNode

from .dynamic import DynamicProposals
from .initial_boxes import INITIAL_BOXES, initial_boxes
from .learned import PROPOSALS_REGISTRY, LearnedProposals, ProposalSource
from .mixing_statistics import mixing_statistics
from .queries import ContentQueries
from .temperature import TemperatureSchedule

__all__ = [
    "INITIAL_BOXES",
    "PROPOSALS_REGISTRY",
    "ContentQueries",
    "DynamicProposals",
    "LearnedProposals",
    "ProposalSource",
    "TemperatureSchedule",
    "build_proposals",
    "initial_boxes",
    "mixing_statistics",
]


def build_proposals(cfg: CfgNode) -> ProposalSource:
    """Learned proposals, or with ``MODEL.SparseRCNN.DPG.ENABLED`` those mixed for each image.

    AdaMixer's are learned in a way of their own.
    """
    name = "ContentQueries" if cfg.MODEL.META_ARCHITECTURE == "AdaMixer" else "LearnedProposals"
    if cfg.MODEL.SparseRCNN.DPG.ENABLED:
        name = "DynamicProposals"
    source: ProposalSource = PROPOSALS_REGISTRY.get(name)(cfg)
    return source
