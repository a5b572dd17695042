"""What the training log says about the assignment: who learns what, stage by stage."""

import torch
from detectron2.config import CfgNode
from torch import Tensor

from ..structures import Predictions, Targets
from .event_log import storage_in_turn
from .matching import Matcher

__all__ = ["AssignmentLog"]


class AssignmentLog:
    """Writes a matcher's statistics into Detectron2's event storage, every `period` iterations.

    They are computed for the log alone, and read from the device in one transfer: iterations in
    between pay nothing. Names are ``dla/<statistic>_<stage>``, stages counted from 0 as in the
    losses, and ``dla/<statistic>`` for the last one.
    """

    def __init__(self, period: int, num_stages: int) -> None:
        """Set the period in iterations and the number of stages."""
        self.period = period
        self.num_stages = num_stages

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "AssignmentLog | None":
        """Read `MODEL.SparseRCNN.DLA`; None where nothing is to be logged."""
        node = cfg.MODEL.SparseRCNN
        if not (node.DLA.ENABLED and node.DLA.LOG_PERIOD):
            return None
        return cls(node.DLA.LOG_PERIOD, node.NUM_HEADS)

    def __call__(
        self, matcher: Matcher, predictions: Predictions, targets: Targets, assignment: Tensor
    ) -> None:
        """Log this iteration if it is its turn."""
        storage = storage_in_turn(self.period)
        if storage is None:
            return
        found = matcher.statistics(predictions, targets, assignment)
        stages = predictions.stage.float()
        rows = torch.stack([stages, *(v.float() for v in found.values())]).cpu()
        for stage in range(self.num_stages):
            of_stage = rows[1:, rows[0] == stage]
            if of_stage.shape[1]:
                suffix = "" if stage == self.num_stages - 1 else f"_{stage}"
                means = dict(zip(found, of_stage.mean(dim=1).tolist(), strict=True))
                storage.put_scalars(
                    smoothing_hint=False, **{f"dla/{k}{suffix}": v for k, v in means.items()}
                )
