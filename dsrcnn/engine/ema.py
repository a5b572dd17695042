"""Exponential moving average (EMA) of the weights, evaluated in place of the weights."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ..utils.references import weak_method
from ..utils.training import TrainingState

_Tensors = tuple[Tensor, ...] | list[Tensor]


class AveragedWeights:
    """Average of a model over the iterations.

    Norm statistics are averaged like parameters; integers and `TrainingState` are copied. All
    processes hold the same average, since they have the same weights. `start` copies the weights.

    Attributes:
        decay: fraction of the average kept per iteration, at most ``(1 + n) / (10 + n)`` after n
            iterations, which discounts the first weights sooner.
        model: not wrapped in `DistributedDataParallel`.
    """

    def __init__(self, model: nn.Module, *, decay: float) -> None:
        self.decay = decay
        self.model = model
        self.average = AveragedModel(model, multi_avg_fn=weak_method(self._blend), use_buffers=True)
        self._copied = [
            pair
            for module, averaged in zip(model.modules(), self.average.module.modules(), strict=True)
            if isinstance(module, TrainingState)
            for pair in zip(averaged.buffers(), module.buffers(), strict=True)
        ]

    def current_decay(self) -> float:
        """Return the decay of the next update."""
        n = int(self.average.n_averaged)  # stays on the host
        return min(self.decay, (1 + n) / (10 + n))

    @torch.no_grad()
    def _blend(self, average: _Tensors, current: _Tensors, _: Tensor | int) -> None:
        if average[0].is_floating_point():
            torch._foreach_lerp_(average, current, 1 - self.current_decay())
        else:
            torch._foreach_copy_(average, current)

    def start(self) -> None:
        """Start from the current weights, unless an average was loaded."""
        if self.average.n_averaged == 0:
            self.average.update_parameters(self.model)  # the first update copies

    def update(self) -> None:
        """Update the average with the current weights."""
        self.average.update_parameters(self.model)
        for average, current in self._copied:
            average.copy_(current)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Give the model the averaged weights inside the block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        current, averaged = (
            itertools.chain(m.parameters(), m.buffers()) for m in (self.model, self.average.module)
        )
        for a, b in zip(current, averaged, strict=True):
            a.data, b.data = b.data, a.data

    def weights(self) -> dict[str, Tensor]:
        """Return the state dict of the average, with the keys of the model."""
        return self.average.module.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """Return the average and its number of updates."""
        return {"model": self.weights(), "updates": int(self.average.n_averaged)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the result of `state_dict`."""
        self.average.module.load_state_dict(state_dict["model"])
        self.average.n_averaged.fill_(state_dict["updates"])
