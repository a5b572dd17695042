"""From a transport plan to an assignment: who gets each proposal.

Letters: ``M`` ground truths, ``R`` = M + 1 rows with background last, ``P`` proposals; ``...`` any
leading axes. An assignment holds the ground truth of each proposal, -1 for background.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .sinkhorn import assign_exact

__all__ = [
    "decide_exact",
    "decide_rescaled",
    "decide_top_units",
    "limit_positives",
    "repair_unmatched",
]


def _rescale_rows(plan: Tensor) -> Tensor:
    """Divide every row by its largest entry, so that suppliers of any size compete as equals."""
    return plan / plan.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(plan.dtype).tiny)


def _best_row(values: Tensor, share: Tensor) -> Tensor:
    """Row of the largest value in every column, (..., R, P) to (..., P).

    Where one proposal is the favourite of several rows, all of them have the value 1. Then the
    largest `share` decides, not the order of the rows.
    """
    best = values == values.amax(dim=-2, keepdim=True)
    return share.masked_fill(~best, -torch.inf).argmax(dim=-2)


def decide_rescaled(plan: Tensor) -> Tensor:
    """Every proposal goes to the row with the largest rescaled entry (OTA, arXiv 2103.14259).

    Without the rescaling, background, whose supply is largest, wins every proposal as long as
    predictions are alike, that is, at the start of training.

    Args:
        plan: (..., R, P).

    Returns:
        (..., P) int64.
    """
    background = plan.shape[-2] - 1
    share = F.pad(plan[..., :-1, :], (0, 0, 0, 1), value=-1.0)  # background yields to its equals
    winner = _best_row(_rescale_rows(plan), share)
    return winner.masked_fill(winner == background, -1)


def decide_top_units(plan: Tensor, units: Tensor) -> Tensor:
    """Every ground truth takes as many of its largest entries as it has units.

    A proposal that several take goes to the one with the largest rescaled entry.

    Args:
        plan: (..., R, P).
        units: (..., M) int64.

    Returns:
        (..., P) int64.
    """
    plan = plan[..., :-1, :]
    rows = _rescale_rows(plan)
    rank = rows.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    claims = rows.masked_fill(rank >= units.unsqueeze(-1), -1)
    return _best_row(claims, plan).masked_fill((claims < 0).all(dim=-2), -1)


def decide_exact(cost: Tensor, supply: Tensor) -> Tensor:
    """The exact plan, problem by problem on the host; for checks and small experiments.

    Args:
        cost: (..., R, P) with background as the last row.
        supply: (..., R) whole numbers.

    Returns:
        (..., P) int64.
    """
    background = cost.shape[-2] - 1
    costs = cost.reshape(-1, *cost.shape[-2:]).cpu()
    supplies = supply.reshape(-1, supply.shape[-1]).cpu()
    rows = torch.stack([assign_exact(c, s) for c, s in zip(costs, supplies, strict=True)])
    rows = rows.masked_fill(rows == background, -1)
    return rows.view(*cost.shape[:-2], -1).to(cost.device)


def limit_positives(assignment: Tensor, plan: Tensor, limit: int) -> Tensor:
    """Keep the `limit` positives with the largest rescaled entries, background for the others.

    `decide_rescaled` gives away more proposals than there are units where many objects compete.
    The favourite of a ground truth has the entry 1 and stays as long as there is room.

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


def repair_unmatched(
    assignment: Tensor, preference: Tensor, wanting: Tensor, passes: int
) -> Tensor:
    """Give ground truths that nobody learns the background proposal they prefer.

    Each pass lets all unmatched ground truths name their best free proposal at once; one that
    several name goes to the largest preference, the others try again in the next pass.

    Args:
        assignment: (..., P) int64.
        preference: (..., M, P), larger is better, finite.
        wanting: (..., M) bool, ground truths that should have a proposal.
        passes: how many.

    Returns:
        (..., P) int64.
    """
    objects = torch.arange(preference.shape[-2], device=assignment.device).unsqueeze(-1)
    for _ in range(passes):
        unmatched = wanting & ~(assignment.unsqueeze(-2) == objects).any(dim=-1)
        free = (assignment < 0).unsqueeze(-2)
        value, proposal = preference.masked_fill(~free, -torch.inf).max(dim=-1, keepdim=True)
        value = value.masked_fill(~unmatched.unsqueeze(-1), -torch.inf)
        offers = torch.full_like(preference, -torch.inf).scatter(-1, proposal, value)
        best, winner = offers.max(dim=-2)
        assignment = torch.where(best > -torch.inf, winner, assignment)
    return assignment
