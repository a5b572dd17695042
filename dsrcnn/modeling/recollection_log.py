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
    another training's, which the sums over groups do not. Of a batch in parts they are the last
    part's share.
    """

    def __init__(self, period: int) -> None:
        """Set the period in iterations."""
        self.period = period

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
    ) -> None:
        """Log this iteration if it is its turn."""
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
        values = dict(zip(losses, means.tolist(), strict=True))
        scalars = {f"plain/{name}": value for name, value in values.items()}
        scalars["plain/total_loss"] = sum(values.values())
        storage.put_scalars(smoothing_hint=False, **scalars)
