"""Losses, dense over an assignment."""

from .criterion import SetCriterion

__all__ = ["SetCriterion"]
