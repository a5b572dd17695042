"""What the training log says about the plain cascade when proposals are recollected (SQR)."""

import torch
from detectron2.config import CfgNode
from torch import Tensor

from ..structures import Predictions, Targets, mean_over_processes
from .decoder.recollection import plain_sets
from .event_log import storage_in_turn
from .losses import LossCounts, SetCriterion

__all__ = ["RecollectionLog"]


class RecollectionLog:
    """Writes the losses that training without recollection would have, every `period` iterations.

    Names are those of the losses after ``plain/``, with ``plain/total_loss``; they compare with
    another training's, which the sums over groups do not. Those of a batch in parts are added up.
    """

    def __init__(self, period: int) -> None:
        """Set the period in iterations."""
        self.period = period
        self._sums: dict[str, float] = {}  # of the parts of this iteration so far

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "RecollectionLog | None":
        """Read `MODEL.SparseRCNN.SQR`; None where nothing is to be logged."""
        node = cfg.MODEL.SparseRCNN.SQR
        return cls(node.LOG_PERIOD) if node.ENABLED and node.LOG_PERIOD else None

    def __call__(
        self,
        criterion: SetCriterion,
        predictions: Predictions,
        targets: Targets,
        assignment: Tensor,
        normalizers: LossCounts | None = None,
        *,
        ends_iteration: bool = True,
    ) -> None:
        """Log this iteration if it is its turn, with the last part of its batch."""
        storage = storage_in_turn(self.period)
        if storage is None:
            return
        sets = plain_sets(predictions)
        plain = predictions.of_sets(sets)
        if normalizers is not None:
            learners, weight = normalizers
            learners = learners[sets] if learners.dim() else learners
            normalizers = LossCounts(learners, None if weight is None else weight[sets])
        with torch.no_grad():
            losses = criterion(plain, targets, assignment[sets], normalizers)
        means = mean_over_processes(torch.stack(list(losses.values())))
        for name, value in zip(losses, means.tolist(), strict=True):
            self._sums[name] = self._sums.get(name, 0.0) + value
        if ends_iteration:
            scalars = {f"plain/{name}": value for name, value in self._sums.items()}
            total = sum(self._sums.values())
            storage.put_scalars(**scalars, **{"plain/total_loss": total}, smoothing_hint=False)
            self._sums = {}
