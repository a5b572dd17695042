"""The interface between a model and the loop that trains it.

A forward pass takes ``batched_inputs`` and nothing else. What it may need to know of its iteration
is in the `TrainingContext`, which the loop sets; without one the defaults describe a batch in one
piece, so models train in any Detectron2 trainer. What the loop needs to know of a model is in
`TrainableModel` and `TrainingState`; models without them train as well.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn


@dataclass(frozen=True)
class TrainingContext:
    """The iteration a forward pass belongs to.

    Attributes:
        normalizers: from `TrainableModel.loss_normalizers`, where a batch comes in several parts;
            None for a batch in one piece.
        ends_iteration: False for all parts of a batch but the last.
        recollect: whether a cascade may refine recollected proposals (SQR); False for validation
            losses, which are those of the cascade that inference runs.
    """

    normalizers: Any = None
    ends_iteration: bool = True
    recollect: bool = True


_CONTEXT: ContextVar[TrainingContext] = ContextVar("context", default=TrainingContext())  # noqa: B039


def training_context() -> TrainingContext:
    """Return the context of the current forward pass."""
    return _CONTEXT.get()


@contextmanager
def use_training_context(**fields: Any) -> Iterator[None]:
    """Change these fields of the `TrainingContext` for the forward passes inside."""
    token = _CONTEXT.set(replace(_CONTEXT.get(), **fields))
    try:
        yield
    finally:
        _CONTEXT.reset(token)


def iteration_ends() -> bool:
    """Whether the current forward pass is the last one of a training iteration.

    Without gradients it is not part of one: batch norm statistics are being estimated, for example.
    """
    return _CONTEXT.get().ends_iteration and torch.is_grad_enabled()


class TrainableModel(nn.Module):
    """Model that tells a training loop about its losses and parameters."""

    @property
    def all_parameters_get_gradients(self) -> bool:
        """Whether all parameters get gradients in every iteration; else DDP searches for unused."""
        return True

    def loss_normalizers(self, parts: list[list[dict[str, Any]]]) -> Any:
        """Return the loss normalizers of a batch that is processed in parts.

        With them in the `TrainingContext`, the gradients of the parts sum to that of the batch.

        Args:
            parts: model inputs.
        """
        raise NotImplementedError


class TrainingState(nn.Module):
    """Module whose buffers hold training state, not weights.

    EMA copies them instead of averaging, and weight files may lack them.
    """

    def share(self) -> None:
        """Gather what every process holds locally; called by all of them before a checkpoint."""
        raise NotImplementedError


@runtime_checkable
class SplitBackbone(Protocol):
    """Backbone that lists its parts by depth, for layer-wise learning rate decay."""

    def parts(self) -> list[list[nn.Module]]:
        """Return the modules of each part: stem, ``res2``, ..., ``res5``."""
