"""Optimizer and learning rate schedule."""

from .optimizer import build_optimizer, clip_full_model
from .schedule import build_lr_scheduler, scale_learning_rate, use_epochs

__all__ = [
    "build_lr_scheduler",
    "build_optimizer",
    "clip_full_model",
    "scale_learning_rate",
    "use_epochs",
]
