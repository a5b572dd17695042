"""SimOTA (YOLOX, arXiv 2107.08430, section 2.1): the cheapest proposals instead of transport.

Notation: ``...`` any leading axes.
"""

from typing import Any

import torch
from detectron2.config import configurable
from torch import Tensor

from ...structures import Targets
from .matcher import MATCHER_REGISTRY, Stats
from .units import UnitMatcher, unit_statistics


def assign_cheapest(cost: Tensor, units: Tensor) -> Tensor:
    """Assign to each ground truth its cheapest proposals, as many as it has units (SimOTA).

    A proposal selected by several ground truths stays with the cheapest one, so a ground truth may
    end without any.

    Args:
        cost: (..., M, P), finite.
        units: (..., M) int64.

    Returns:
        (..., P) int64.
    """
    rank = cost.argsort(dim=-1, stable=True).argsort(dim=-1)
    best, winner = cost.masked_fill(rank >= units.unsqueeze(-1), torch.inf).min(dim=-2)
    return winner.masked_fill(best == torch.inf, -1)


@MATCHER_REGISTRY.register()
class SimOTAMatcher(UnitMatcher):
    """Several proposals per ground truth, as many as it has units, selected by cost alone."""

    on_device = True

    @configurable
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    def assign(
        self, cost: Tensor, iou: Tensor, stage: Tensor, targets: Targets, stats: Stats = None
    ) -> Tensor:
        """Assign the cheapest proposals, see `assign_cheapest`."""
        units = self.units(iou, targets.mask, stage)
        if stats is not None:
            stats |= unit_statistics(units, targets.mask)
        return assign_cheapest(cost, units)
