"""SimOTA (YOLOX, arXiv 2107.08430, section 2.1): the cheapest proposals instead of transport.

Letters: ``Q`` prediction sets, ``B`` images, ``P`` proposals, ``M`` ground truths; ``...`` any
leading axes.
"""

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor

from ...structures import Targets
from .assignment import repair_unmatched
from .costs import CostSettings
from .matcher import MATCHER_REGISTRY, UnitMatcher
from .units import UnitRule

__all__ = ["SimOTAMatcher", "assign_cheapest"]


def assign_cheapest(cost: Tensor, units: Tensor) -> Tensor:
    """Every ground truth takes as many of its cheapest proposals as it has units.

    A proposal that several take stays with the one it costs least. Who loses all proposals in this
    way is left without; `repair_unmatched` mends that.

    Args:
        cost: (..., M, P), finite.
        units: (..., M) int64.

    Returns:
        (..., P) int64: index of the ground truth, -1 for background.
    """
    rank = cost.argsort(dim=-1, stable=True).argsort(dim=-1)
    best, winner = cost.masked_fill(rank >= units.unsqueeze(-1), torch.inf).min(dim=-2)
    return winner.masked_fill(best == torch.inf, -1)


@MATCHER_REGISTRY.register()
class SimOTAMatcher(UnitMatcher):
    """Several proposals per ground truth, as many as it has units, chosen by cost alone."""

    @configurable
    def __init__(self, *, costs: CostSettings, units: UnitRule, repair: int = 0) -> None:
        """Set the assignment.

        Args:
            costs: how costs are computed.
            units: how many proposals a ground truth takes.
            repair: passes of `repair_unmatched`.
        """
        super().__init__(costs=costs, units=units, repair=repair)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read `MODEL.SparseRCNN`."""
        return {
            "costs": CostSettings.from_config(cfg),
            "units": UnitRule.from_config(cfg),
            "repair": cfg.MODEL.SparseRCNN.DLA.REPAIR,
        }

    def assign(self, cost: Tensor, iou: Tensor, stage: Tensor, targets: Targets) -> Tensor:
        """See `assign_cheapest`."""
        units = self.units(iou, targets.mask, stage)
        assignment = assign_cheapest(cost, units)
        return repair_unmatched(assignment, -cost, units > 0, self.repair)
