"""Batch norms that are to be used without being changed."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["norms_at_rest"]


@contextmanager
def norms_at_rest(module: nn.Module) -> Iterator[None]:
    """Leave the running statistics of batch norms as they are.

    In training mode they still normalise by the batch. For a second look at a batch, which must not
    count twice: recomputation under activation checkpointing, or a pass that only counts.

    Args:
        module: all batch norms inside rest.
    """
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]
    before = [(m.momentum, m.num_batches_tracked) for m in norms]
    for norm, (_, count) in zip(norms, before, strict=True):
        norm.momentum = 0.0
        # A counter to count in vain: SyncBatchNorm insists on having one.
        norm.num_batches_tracked = None if count is None else count.clone()
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
