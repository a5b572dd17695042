"""Tensors that are computed once and kept: a transfer or a computation less in every pass."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch

_T = TypeVar("_T")
_HOLDER: ContextVar[list[object] | None] = ContextVar("holder", default=None)


def made_once(function: Callable[..., _T]) -> Callable[..., _T]:
    """Keep the last 256 results of a function that makes constants on a device.

    They are made outside of inference mode, whose tensors a later training step could not use.
    """

    @functools.lru_cache(maxsize=256)
    def cached(*args: Any) -> _T:
        with torch.inference_mode(False):
            return function(*args)

    @functools.wraps(function)
    def make(*args: Any) -> _T:
        # A compiler keeps them itself.
        return function(*args) if torch.compiler.is_compiling() else held(cached(*args))

    return make


def held(constant: _T) -> _T:
    """Return a kept constant, and add it to the list of `holding` if there is one."""
    holder = _HOLDER.get()
    if holder is not None:
        holder.append(constant)
    return constant


@contextmanager
def holding() -> Iterator[list[object]]:
    """Collect the constants used inside of the block.

    A CUDA graph reads them at their addresses, so it must keep them alive.
    """
    holder: list[object] = []
    token = _HOLDER.set(holder)
    try:
        yield holder
    finally:
        _HOLDER.reset(token)
