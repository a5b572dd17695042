"""Regions of a model that ``torch.compile`` fuses (``MODEL.COMPILE``).

Regions are what runs often with few shapes: a stage and its pooling (one graph serves all stages),
costs, assignment, losses. What logs, talks to other processes or reads values stays outside, so no
region breaks into parts, and no shape in them depends on the size of an image.
"""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from detectron2.config import CfgNode

_P = ParamSpec("_P")
_R = TypeVar("_R")


def compile_mode(cfg: CfgNode) -> str:
    """Return the mode of ``torch.compile``, empty without ``MODEL.COMPILE``."""
    return str(cfg.MODEL.COMPILE_MODE) if cfg.MODEL.COMPILE else ""


def in_region(function: Callable[_P, _R], mode: str) -> Callable[_P, _R]:
    """Return `function` compiled in `mode`, or as it is if that is empty.

    Pass methods as functions of their class: a module that kept its compiled method could not be
    copied, since the copy would run the method of the original.
    """
    return _compiled(function, mode) if mode else function


@functools.cache
def _compiled(function: Callable[_P, _R], mode: str) -> Callable[_P, _R]:
    return torch.compile(function, mode=mode)
