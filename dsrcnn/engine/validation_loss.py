"""Losses on held-out data, without learning anything from them."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from ..modeling.decoder import Cascade
from ..structures import each_for_itself

__all__ = ["losses_without_learning", "validation_losses"]

_DIFFERENT_WHEN_TRAINING = (_BatchNorm, _DropoutNd, nn.MultiheadAttention)


@contextmanager
def losses_without_learning(model: nn.Module) -> Iterator[None]:
    """Inside, the model gives losses as at inference.

    Norms use stored statistics, nothing is dropped, and a cascade refines no recollected proposals
    (SQR): losses are those of what inference runs, and compare with those of other trainings.
    """
    before = {module: module.training for module in model.modules()}
    cascades = [m for m in before if isinstance(m, Cascade) and m.recollects]
    model.train()
    for cascade in cascades:
        cascade.recollects = False
    for module in before:
        if isinstance(module, _DIFFERENT_WHEN_TRAINING):
            module.training = False
    try:
        # Detectron2's heads log what they do: not into the log of the training.
        with torch.no_grad(), each_for_itself(), EventStorage():
            yield
    finally:
        for cascade in cascades:
            cascade.recollects = True
        for module, training in before.items():
            module.training = training


def validation_losses(model: nn.Module, loader: Iterable[list[dict[str, Any]]]) -> dict[str, float]:
    """Mean losses over the images of all processes.

    Args:
        model: not wrapped for several processes: those need not have equally many images.
        loader: this process's batches, with ``instances``.

    Returns:
        Losses by name and ``total_loss``; empty on all processes but the main one.
    """
    sums: dict[str, float] = defaultdict(float)
    count = 0
    with losses_without_learning(model):
        for batch in loader:
            for name, value in model(batch).items():
                sums[name] += float(value) * len(batch)
            count += len(batch)
    gathered = comm.gather((dict(sums), count))
    if not comm.is_main_process():
        return {}
    images = sum(number for _, number in gathered)
    names = {name for losses, _ in gathered for name in losses}
    means = {n: sum(losses.get(n, 0.0) for losses, _ in gathered) / images for n in sorted(names)}
    return {"total_loss": sum(means.values()), **means}
