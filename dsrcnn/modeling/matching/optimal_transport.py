"""DLA's matcher: optimal transport between ground truths and proposals (arXiv 2205.02101, 3.1).

Letters: ``Q`` prediction sets, ``B`` images, ``P`` proposals, ``M`` ground truths, ``R`` = M + 1
rows with background last.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from torch import Tensor

from ...structures import Targets
from .assignment import (
    decide_exact,
    decide_rescaled,
    decide_top_units,
    limit_positives,
    repair_unmatched,
)
from .costs import CostSettings
from .matcher import MATCHER_REGISTRY, UnitMatcher
from .sinkhorn import column_error, sinkhorn
from .units import UnitRule

__all__ = ["OptimalTransportMatcher", "Transport"]


class Transport(NamedTuple):
    """The transport problem of every set and image.

    Attributes:
        cost: (Q, B, R, P), zero in the background row.
        supply: (Q, B, R), summing to P; zero in the padding.
    """

    cost: Tensor
    supply: Tensor

    @classmethod
    def of(cls, cost: Tensor, units: Tensor, mask: Tensor) -> "Transport":
        """Add the background to costs (Q, B, M, P) and units (Q, B, M) of ground truths.

        The cost of background is subtracted from every column already (see `pairwise_costs`), which
        changes no plan, so what is left of it is zero. Padded rows become zero as well.
        """
        rows = cost.masked_fill(~mask.unsqueeze(-1), 0.0)
        rest = cost.shape[-1] - units.sum(dim=-1, keepdim=True)
        supply = torch.cat([units, rest], dim=-1).to(cost.dtype)
        return cls(F.pad(rows, (0, 0, 0, 1)), supply)


@MATCHER_REGISTRY.register()
class OptimalTransportMatcher(UnitMatcher):
    """Several proposals per ground truth, as many as it has units, chosen by optimal transport."""

    @configurable
    def __init__(
        self,
        *,
        costs: CostSettings,
        units: UnitRule,
        epsilon: float = 0.1,
        iterations: int = 50,
        decision: str = "rescale",
        repair: int = 0,
    ) -> None:
        """Set the transport.

        Args:
            costs: how costs are computed.
            units: how many proposals a ground truth supplies.
            epsilon: see `sinkhorn`.
            iterations: see `sinkhorn`.
            decision: "rescale" for `decide_rescaled`, "topk" for `decide_top_units`, "exact" for
                `decide_exact`, which needs neither `epsilon` nor `iterations`.
            repair: passes of `repair_unmatched`.
        """
        super().__init__(costs=costs, units=units, repair=repair)
        self.epsilon = epsilon
        self.iterations = iterations
        self.decision = decision

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read `MODEL.SparseRCNN`."""
        node = cfg.MODEL.SparseRCNN.DLA
        return {
            "costs": CostSettings.from_config(cfg),
            "units": UnitRule.from_config(cfg),
            "epsilon": node.EPSILON,
            "iterations": node.ITERATIONS,
            "decision": node.DECISION,
            "repair": node.REPAIR,
        }

    def extra_repr(self) -> str:
        """Settings for the printed model."""
        own = f"epsilon={self.epsilon}, iterations={self.iterations}, decision={self.decision}"
        return f"{super().extra_repr()}, {own}"

    def assign(self, cost: Tensor, iou: Tensor, stage: Tensor, targets: Targets) -> Tensor:
        """Units, then a plan, then a decision, then the repair if any."""
        units = self.units(iou, targets.mask, stage)
        problem = Transport.of(cost, units, targets.mask)
        if self.decision == "exact":
            assignment, preference = decide_exact(*problem), -problem.cost
        else:
            preference = self.plan(problem)
            if self.decision == "topk":
                assignment = decide_top_units(preference, units)
            else:
                assignment = decide_rescaled(preference)
        if self.repair:
            assignment = repair_unmatched(
                assignment, preference[..., :-1, :], units > 0, self.repair
            )
        if self.decision == "rescale":  # the others never exceed the units
            limit = self.units.max_positives(cost.shape[-1])
            assignment = limit_positives(assignment, preference, limit)
        return assignment

    def plan(self, problem: Transport) -> Tensor:
        """The transport plan (Q, B, R, P)."""
        return sinkhorn(*problem, epsilon=self.epsilon, iterations=self.iterations)

    def plan_statistics(self, cost: Tensor, units: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """``column_error`` of the plan, (Q,), the worst of the images."""
        if self.decision == "exact":
            return {}
        plan = self.plan(Transport.of(cost, units, mask))
        return {"column_error": column_error(plan).amax(dim=-1)}
