"""Optimizers and schedules."""

from .optimizer import build_optimizer, clip_full_model
from .schedule import scale_learning_rate, use_epochs

__all__ = ["build_optimizer", "clip_full_model", "scale_learning_rate", "use_epochs"]
