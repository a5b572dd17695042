"""Augmentation beyond Detectron2's, by ``INPUT.AUG``."""

from .albumentations import AlbumentationsAdapter
from .build import build_albumentations, build_augmentations, build_resizing
from .geometric import RandomWarp, WarpTransform
from .photometric import RandomBlur, RandomHSV, RandomNoise

__all__ = [
    "AlbumentationsAdapter",
    "RandomBlur",
    "RandomHSV",
    "RandomNoise",
    "RandomWarp",
    "WarpTransform",
    "build_albumentations",
    "build_augmentations",
    "build_resizing",
]
