"""What the training log says about anchors: how many, how good, and how much is probed."""

import torch
from detectron2.config import CfgNode

from ..event_log import storage_in_turn
from .anchors import Anchors, ProbedLevel

__all__ = ["AnchorLog"]


class AnchorLog:
    """Writes into Detectron2's event storage, every `period` iterations.

    Means over the images of the process: ``asag/anchors``, ``asag/location_score`` of the best
    anchor, and for level 4 and 3 ``asag/patches_p4`` that gave anchors out.
    """

    def __init__(self, period: int) -> None:
        """Set the period in iterations."""
        self.period = period

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "AnchorLog | None":
        """Read `MODEL.ASAG`; None where nothing is to be logged."""
        period = cfg.MODEL.ASAG.LOG_PERIOD
        return cls(period) if period else None

    def __call__(self, anchors: Anchors, probed: list[ProbedLevel]) -> None:
        """Log this iteration if it is its turn."""
        storage = storage_in_turn(self.period)
        if storage is None:
            return
        images = len(anchors.mask)
        found = {
            "anchors": anchors.mask.sum() / images,
            "location_score": anchors.scores.amax(dim=1).mean(),
        }
        for level in probed:
            name = f"patches_p{level.stride.bit_length() - 1}"
            found[name] = (~level.spare).sum() / images
        values = torch.stack(list(found.values())).tolist()  # one transfer
        named = {f"asag/{k}": v for k, v in zip(found, values, strict=True)}
        storage.put_scalars(smoothing_hint=False, **named)
