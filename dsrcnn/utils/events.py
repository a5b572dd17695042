"""Logging of scalars from inside a model, every ``LOG.PERIOD`` iterations."""

from collections.abc import Mapping

import torch
from detectron2.utils.events import EventStorage, get_event_storage
from torch import Tensor


class ScalarLog:
    """Write scalars into Detectron2's event storage every `period` iterations.

    Scalars are read from the device in one transfer. In between, iterations pay nothing: compute
    what is logged only if `is_due`.
    """

    def __init__(self, period: int) -> None:
        """Set the period in iterations, 0 for never (``LOG.PERIOD``)."""
        self.period = period

    def is_due(self) -> bool:
        """Whether this iteration is logged.

        False without a trainer, while a model is compiled and without gradients, since a forward
        pass is no training step then.
        """
        return self._storage() is not None

    def write(self, prefix: str, scalars: Mapping[str, Tensor | float]) -> None:
        """Log ``<prefix>/<name>`` if this iteration is logged; NaN entries are skipped.

        The values are those of this process and forward pass; of several writes in an iteration,
        one for each part of a batch, the last one counts.

        Args:
            prefix: group of the scalars, such as ``dla``.
            scalars: 0-d tensors of one device, or numbers.
        """
        storage = self._storage()
        if storage is None:
            return
        tensors = {k: v.detach() for k, v in scalars.items() if isinstance(v, Tensor)}
        values = {k: float(v) for k, v in scalars.items() if k not in tensors}
        if tensors:
            numbers = torch.stack([v.float() for v in tensors.values()]).tolist()
            values |= dict(zip(tensors, numbers, strict=True))
        # NaN, from a step with nothing to measure, is not valid JSON.
        named = {f"{prefix}/{k}": values[k] for k in scalars if values[k] == values[k]}
        storage.put_scalars(smoothing_hint=False, **named)

    def _storage(self) -> EventStorage | None:
        if not self.period or torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return None
        try:
            storage = get_event_storage()
        except AssertionError:
            return None
        return None if (storage.iter + 1) % self.period else storage
