"""ASAG (arXiv 2308.09242): anchors of the image instead of learned proposals, one decoder layer."""

from .anchor_generator import AnchorGenerator, AnchorLog
from .build import LEVELS_PROBED, build_decoders, build_generator
from .criterion import ASAGCounts, ASAGCriterion, objects_of
from .patches import Anchors, FixedLevels, Objects, PatchLessons, ProbedLevel, ProbingRule
from .queries import (
    InitialQueries,
    NoisyQueries,
    ParallelDecoders,
    QueryInitializer,
    attention_mask,
    denoising_mask,
    noisy_queries,
)

__all__ = [
    "LEVELS_PROBED",
    "ASAGCounts",
    "ASAGCriterion",
    "AnchorGenerator",
    "AnchorLog",
    "Anchors",
    "FixedLevels",
    "InitialQueries",
    "NoisyQueries",
    "Objects",
    "ParallelDecoders",
    "PatchLessons",
    "ProbedLevel",
    "ProbingRule",
    "QueryInitializer",
    "attention_mask",
    "build_decoders",
    "build_generator",
    "denoising_mask",
    "noisy_queries",
    "objects_of",
]
