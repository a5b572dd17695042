"""Optimizers."""

from .optimizer import build_optimizer, clip_full_model

__all__ = ["build_optimizer", "clip_full_model"]
