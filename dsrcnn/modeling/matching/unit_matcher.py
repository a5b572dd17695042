"""What matchers share that give a ground truth several proposals.

Letters: ``Q`` prediction sets, ``B`` images, ``P`` proposals, ``M`` ground truths.
"""

import torch
from torch import Tensor

from ...structures import Predictions, Targets
from .costs import CostSettings
from .matcher import Matcher
from .units import UnitRule, unit_statistics

__all__ = ["UnitMatcher"]


class UnitMatcher(Matcher):
    """Has units, a repair, and tells about the units in the log."""

    def __init__(self, *, costs: CostSettings, units: UnitRule, repair: int) -> None:
        """Set what all of them have.

        Args:
            costs: how costs are computed.
            units: how many proposals a ground truth supplies.
            repair: passes of `repair_unmatched`.
        """
        super().__init__(costs=costs)
        self.units = units
        self.repair = repair

    def extra_repr(self) -> str:
        """Settings for the printed model."""
        return f"{super().extra_repr()}, {self.units}, repair={self.repair}"

    @torch.no_grad()
    def statistics(
        self, predictions: Predictions, targets: Targets, assignment: Tensor
    ) -> dict[str, Tensor]:
        """Adds the units (`unit_statistics`) and what `plan_statistics` tells."""
        found = super().statistics(predictions, targets, assignment)
        if targets.mask.shape[1] == 0:
            return found
        cost, iou = self.finite_costs(predictions, targets)
        units = self.units(iou, targets.mask, predictions.stage)
        found |= unit_statistics(units, targets.mask)
        return found | self.plan_statistics(cost, units, targets.mask)

    def plan_statistics(self, cost: Tensor, units: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """What a matcher has to tell beyond units: nothing, unless it says otherwise.

        Args:
            cost: (Q, B, M, P), finite.
            units: (Q, B, M).
            mask: (B, M) bool.

        Returns:
            Tensors (Q,) by name.
        """
        return {}
