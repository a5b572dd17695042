"""Losses, dense over an assignment."""

from .criterion import LossNormalizers, SetCriterion

__all__ = ["LossNormalizers", "SetCriterion"]
