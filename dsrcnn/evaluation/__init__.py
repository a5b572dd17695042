"""Evaluators."""

from .build import build_evaluator
from .coco import CocoEvaluator

__all__ = ["CocoEvaluator", "build_evaluator"]
