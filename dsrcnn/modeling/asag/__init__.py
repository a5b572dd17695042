"""ASAG (arXiv 2308.09242): anchors of the image instead of learned proposals, one decoder layer."""

from .anchor_generator import AnchorGenerator, Anchors, ProbingRule
from .parallel_decoders import ParallelDecoders
from .query_initializer import InitialQueries, QueryInitializer, UnalignedRoIs, attention_mask

__all__ = [
    "AnchorGenerator",
    "Anchors",
    "InitialQueries",
    "ParallelDecoders",
    "ProbingRule",
    "QueryInitializer",
    "UnalignedRoIs",
    "attention_mask",
]
