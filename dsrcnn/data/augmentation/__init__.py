"""Augmentation beyond Detectron2's, by ``INPUT.AUG``."""

from .build import build_augmentations, build_resizing
from .geometric import RandomWarp, WarpTransform
from .photometric import RandomBlur, RandomHSV, RandomNoise

__all__ = [
    "RandomBlur",
    "RandomHSV",
    "RandomNoise",
    "RandomWarp",
    "WarpTransform",
    "build_augmentations",
    "build_resizing",
]
