"""What the processes of one training share."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["each_for_itself", "gathered_over_processes", "mean_over_processes"]

_ALONE: ContextVar[bool] = ContextVar("alone", default=False)


def mean_over_processes(value: Tensor) -> Tensor:
    """Average a tensor over all processes; it stays on its device."""
    if _ALONE.get() or not (dist.is_available() and dist.is_initialized()):
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value / dist.get_world_size()


def gathered_over_processes(value: Tensor) -> Tensor:
    """The tensors (...) of all processes as one (W, ...); they have the same shape everywhere."""
    if _ALONE.get() or not (dist.is_available() and dist.is_initialized()):
        return value.unsqueeze(0)
    found = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(found, value.contiguous())
    return torch.stack(found)


@contextmanager
def each_for_itself() -> Iterator[None]:
    """Without averaging inside.

    For work that is split unevenly, such as an evaluation: a process with one image more would wait
    for others that are done, forever.
    """
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)
