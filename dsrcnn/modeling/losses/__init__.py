"""Losses, dense over an assignment."""

from .criterion import LossCounts, SetCriterion

__all__ = ["LossCounts", "SetCriterion"]
