"""From costs or a transport plan to an assignment.

An assignment has the ground truth of each proposal, -1 for background.

Notation: ``R`` = M + 1 rows with background last; ``...`` any leading axes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["assign_cheapest", "assign_from_plan", "limit_positives"]


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


def limit_positives(assignment: Tensor, plan: Tensor, limit: int) -> Tensor:
    """Keep the `limit` positives with the largest row-normalized entries, background for the rest.

    `assign_from_plan` may assign more proposals than there are units where many ground truths
    compete. The first choice of a ground truth has the entry 1 and stays as long as there is room.

    Args:
        assignment: (..., P) int64.
        plan: (..., R, P).
        limit: largest number of positives of an image.

    Returns:
        (..., P) int64.
    """
    entries = _rescale_rows(plan).take_along_dim(assignment.clamp(min=0).unsqueeze(-2), dim=-2)
    entries = entries.squeeze(-2).masked_fill(assignment < 0, -1)
    rank = entries.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return assignment.masked_fill(rank >= limit, -1)


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
