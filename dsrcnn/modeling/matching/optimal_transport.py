"""DLA's matcher: optimal transport from ground truths to proposals (arXiv 2205.02101, 3.1).

Notation: ``R`` = M + 1 rows with background last; ``...`` any leading axes.
"""

from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from torch import Tensor

from ...structures import Targets
from .matcher import MATCHER_REGISTRY, Stats
from .sinkhorn import column_error, sinkhorn
from .units import UnitMatcher, unit_statistics


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


def _rescale_rows(plan: Tensor) -> Tensor:
    """Divide every row by its largest entry, so that rows of any supply compete as equals."""
    return plan / plan.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(plan.dtype).tiny)


def assign_from_plan(plan: Tensor) -> Tensor:
    """Assign each proposal to the row with the largest row-normalized entry (OTA, 2103.14259).

    Without the normalization, background, whose supply is largest, would win every proposal while
    all predictions are alike, that is, at the start of training. If a proposal is the largest entry
    of several rows, all of them have the value 1; then the largest entry of the plan decides, so
    that the order of the ground truths does not matter, and background never wins.

    Args:
        plan: (..., R, P).

    Returns:
        (..., P) int64.
    """
    background = plan.shape[-2] - 1
    share = F.pad(plan[..., :-1, :], (0, 0, 0, 1), value=-1.0)
    rows = _rescale_rows(plan)
    best = rows == rows.amax(dim=-2, keepdim=True)
    winner = share.masked_fill(~best, -torch.inf).argmax(dim=-2)
    return winner.masked_fill(winner == background, -1)


def limit_positives(assignment: Tensor, plan: Tensor, limit: Tensor) -> Tensor:
    """Keep the `limit` positives with the largest row-normalized entries, background for the rest.

    `assign_from_plan` may assign more proposals than there are units where many ground truths
    compete. The first choice of a ground truth has the entry 1 and stays as long as there is room.

    Args:
        assignment: (..., P) int64.
        plan: (..., R, P).
        limit: (...) largest number of positives of an image.

    Returns:
        (..., P) int64.
    """
    entries = _rescale_rows(plan).take_along_dim(assignment.clamp(min=0).unsqueeze(-2), dim=-2)
    entries = entries.squeeze(-2).masked_fill(assignment < 0, -1)
    rank = entries.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return assignment.masked_fill(rank >= limit.unsqueeze(-1), -1)


@MATCHER_REGISTRY.register()
class OptimalTransportMatcher(UnitMatcher):
    """Several proposals per ground truth, as many as it has units, chosen by optimal transport."""

    on_device = True

    @configurable
    def __init__(self, *, epsilon: float = 0.1, iterations: int = 50, **kwargs: Any) -> None:
        """Set `epsilon` and `iterations` of `sinkhorn`; other arguments are `UnitMatcher`'s."""
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
        self, cost: Tensor, iou: Tensor, stage: Tensor, targets: Targets, stats: Stats = None
    ) -> Tensor:
        """Compute units, then the transport plan, then the assignment."""
        units = self.units(iou, targets.mask, stage)
        problem = transport_problem(cost, units, targets.mask)
        plan = sinkhorn(*problem, epsilon=self.epsilon, iterations=self.iterations)
        limit = targets.mask.sum(dim=-1).clamp(min=self.units.max_positives(cost.shape[-1]))
        if stats is not None:
            stats |= unit_statistics(units, targets.mask)
            stats["column_error"] = column_error(plan).amax(dim=-1)
        return limit_positives(assign_from_plan(plan), plan, limit)
