"""SimOTA (YOLOX, arXiv 2107.08430, section 2.1): the cheapest proposals instead of transport."""

from typing import Any

from detectron2.config import configurable
from torch import Tensor

from ...structures import Targets
from .assignment import assign_cheapest
from .matcher import MATCHER_REGISTRY, UnitMatcher
from .units import unit_statistics

__all__ = ["SimOTAMatcher"]


@MATCHER_REGISTRY.register()
class SimOTAMatcher(UnitMatcher):
    """Several proposals per ground truth, as many as it has units, chosen by cost alone."""

    @configurable
    def __init__(self, **kwargs: Any) -> None:
        """Set costs and units, see `UnitMatcher`."""
        super().__init__(**kwargs)

    def assign(
        self, cost: Tensor, iou: Tensor, stage: Tensor, targets: Targets
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Assign the cheapest proposals, see `assign_cheapest`."""
        units = self.units(iou, targets.mask, stage)
        return assign_cheapest(cost, units), unit_statistics(units, targets.mask)
