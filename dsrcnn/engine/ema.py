"""An exponential moving average of the weights (EMA), evaluated instead of the weights."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

__all__ = ["AveragedWeights"]

_Tensors = tuple[Tensor, ...] | list[Tensor]


class AveragedWeights:
    """The average of a model over its iterations.

    Norm statistics are averaged like parameters; whole numbers are copied. Every process holds the
    same average, as all have the same weights.
    """

    def __init__(self, model: nn.Module, *, decay: float = 0.9998, warmup: bool = True) -> None:
        """Prepare; `start` and `update` do the work.

        Args:
            model: not wrapped for several processes.
            decay: share of the average that an iteration keeps.
            warmup: keep at most ``(1 + n) / (10 + n)`` after n iterations.
        """
        self.decay = decay
        self.warmup = warmup
        self.model = model
        self.average = AveragedModel(model, multi_avg_fn=self._blend, use_buffers=True)
        # A module whose `averaged` is False holds no weights but numbers of the training.
        self._copied = [
            pair
            for own, other in zip(model.modules(), self.average.module.modules(), strict=True)
            if not getattr(own, "averaged", True)
            for pair in zip(other.buffers(), own.buffers(), strict=True)
        ]

    def current_decay(self) -> float:
        """Of the next update."""
        n = int(self.average.n_averaged)  # stays on the host
        return min(self.decay, (1 + n) / (10 + n)) if self.warmup else self.decay

    @torch.no_grad()
    def _blend(self, average: _Tensors, current: _Tensors, _: Tensor | int) -> None:
        if average[0].is_floating_point():
            torch._foreach_lerp_(average, current, 1 - self.current_decay())
        else:
            torch._foreach_copy_(average, current)

    def start(self) -> None:
        """Begin with the model as it is now, unless the average was loaded."""
        if self.average.n_averaged == 0:
            self.average.update_parameters(self.model)  # the first update copies

    def update(self) -> None:
        """Take the model's new weights in."""
        self.average.update_parameters(self.model)
        for average, own in self._copied:
            average.copy_(own)

    @contextmanager
    def in_place_of_the_weights(self) -> Iterator[None]:
        """Inside, the model has the averaged weights; afterwards its own, whatever happens."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        own, averaged = (
            itertools.chain(m.parameters(), m.buffers()) for m in (self.model, self.average.module)
        )
        for a, b in zip(own, averaged, strict=True):
            a.data, b.data = b.data, a.data

    def weights(self) -> dict[str, Tensor]:
        """State dict of the average, with the keys of the model."""
        return self.average.module.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint: ``model`` as the checkpoint's own, and the number of updates."""
        return {"model": self.weights(), "updates": int(self.average.n_averaged)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.average.module.load_state_dict(state_dict["model"])
        self.average.n_averaged.fill_(state_dict["updates"])
