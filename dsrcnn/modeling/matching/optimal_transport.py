"""DLA's matcher: optimal transport from ground truths to proposals (arXiv 2205.02101, 3.1).

Notation: ``R`` = M + 1 rows with background last.
"""

from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from torch import Tensor

from ...structures import Targets
from .assignment import assign_from_plan, limit_positives
from .matcher import MATCHER_REGISTRY, UnitMatcher
from .sinkhorn import column_error, sinkhorn
from .units import unit_statistics

__all__ = ["OptimalTransportMatcher", "transport_problem"]


def transport_problem(cost: Tensor, units: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Add the background row.

    The cost of background is already subtracted from every column (see `pairwise_costs`), which
    changes no plan, so its row is zero. Padded rows become zero as well.

    Args:
        cost: (Q, B, M, P).
        units: (Q, B, M).
        mask: (B, M) bool, True for real ground truths.

    Returns:
        Cost (Q, B, R, P), and supply (Q, B, R), summing to P.
    """
    rows = cost.masked_fill(~mask.unsqueeze(-1), 0.0)
    rest = cost.shape[-1] - units.sum(dim=-1, keepdim=True)
    supply = torch.cat([units, rest], dim=-1).to(cost.dtype)
    return F.pad(rows, (0, 0, 0, 1)), supply


@MATCHER_REGISTRY.register()
class OptimalTransportMatcher(UnitMatcher):
    """Several proposals per ground truth, as many as it has units, chosen by optimal transport."""

    @configurable
    def __init__(self, *, epsilon: float = 0.1, iterations: int = 50, **kwargs: Any) -> None:
        """Set the transport.

        Args:
            epsilon: see `sinkhorn`.
            iterations: see `sinkhorn`.
            **kwargs: of `UnitMatcher`.
        """
        super().__init__(**kwargs)
        self.epsilon = epsilon
        self.iterations = iterations

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read `MODEL.SparseRCNN`."""
        node = cfg.MODEL.SparseRCNN.DLA
        transport = {"epsilon": node.EPSILON, "iterations": node.ITERATIONS}
        return {**super().from_config(cfg), **transport}

    def extra_repr(self) -> str:
        """Settings for the printed model."""
        return f"{super().extra_repr()}, epsilon={self.epsilon}, iterations={self.iterations}"

    def assign(
        self, cost: Tensor, iou: Tensor, stage: Tensor, targets: Targets
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute units, then the transport plan, then the assignment."""
        units = self.units(iou, targets.mask, stage)
        problem = transport_problem(cost, units, targets.mask)
        plan = sinkhorn(*problem, epsilon=self.epsilon, iterations=self.iterations)
        limit = self.units.max_positives(cost.shape[-1])
        statistics = unit_statistics(units, targets.mask)
        statistics["column_error"] = column_error(plan).amax(dim=-1)
        return limit_positives(assign_from_plan(plan), plan, limit), statistics
