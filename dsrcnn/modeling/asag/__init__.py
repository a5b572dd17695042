"""ASAG (arXiv 2308.09242): anchors of the image instead of learned proposals, one decoder layer."""

from .anchor_generator import AnchorGenerator
from .anchor_log import AnchorLog
from .anchors import Anchors, FixedLevels, Objects, ProbedLevel, ProbingRule
from .build import LEVELS_PROBED, build_decoders, build_generator
from .criterion import ASAGCounts, ASAGCriterion, objects_of
from .denoising import NoisyQueries, denoising_mask, noisy_queries
from .parallel_decoders import ParallelDecoders
from .query_initializer import InitialQueries, QueryInitializer, attention_mask
from .training_patches import PatchLessons

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
