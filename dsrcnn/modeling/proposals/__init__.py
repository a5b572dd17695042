"""Where proposals come from."""

from .build import PROPOSALS_REGISTRY, ProposalSource, build_proposals
from .dynamic import DynamicProposals, TemperatureSchedule, mixing_statistics
from .learned import INITIAL_BOXES, ContentQueries, LearnedProposals, initial_boxes

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
