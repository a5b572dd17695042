"""Sources of proposals; importing it registers them."""

from .build import PROPOSALS_REGISTRY, ProposalSource, build_proposals, resize_proposals
from .dense import DenseDistinct
from .dynamic import DynamicProposals, TemperatureSchedule
from .encoded import EncoderQueries
from .learned import ContentQueries, LearnedProposals, LearnedQueries

__all__ = [
    "PROPOSALS_REGISTRY",
    "ContentQueries",
    "DenseDistinct",
    "DynamicProposals",
    "EncoderQueries",
    "LearnedProposals",
    "LearnedQueries",
    "ProposalSource",
    "TemperatureSchedule",
    "build_proposals",
    "resize_proposals",
]
