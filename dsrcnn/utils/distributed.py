"""Collectives that also work in a single process."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.distributed as dist
from torch import Tensor

_LOCAL: ContextVar[bool] = ContextVar("local_reductions", default=False)


def _is_single() -> bool:
    return _LOCAL.get() or not (dist.is_available() and dist.is_initialized())


def reduce_mean(tensor: Tensor) -> Tensor:
    """Average a tensor over all processes; the result stays on its device."""
    if _is_single():
        return tensor
    tensor = tensor.clone()
    dist.all_reduce(tensor)
    return tensor / dist.get_world_size()


def all_gather(tensor: Tensor) -> Tensor:
    """Stack the tensors (...) of all W processes, of equal shape, to (W, ...)."""
    if _is_single():
        return tensor.unsqueeze(0)
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, tensor.contiguous())
    return torch.stack(gathered)


@contextmanager
def local_reductions() -> Iterator[None]:
    """Turn the collectives of this module into no-ops inside.

    For work that is split unevenly, such as an evaluation: a process with one image more would wait
    forever for processes that are done.
    """
    token = _LOCAL.set(True)
    try:
        yield
    finally:
        _LOCAL.reset(token)
