"""Evaluators."""

from .build import build_evaluator
from .coco import CocoEvaluator
from .duplicates import duplicates_per_object

__all__ = ["CocoEvaluator", "build_evaluator", "duplicates_per_object"]
