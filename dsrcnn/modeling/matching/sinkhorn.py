"""Optimal transport from ground truths to proposals: entropic (on any device) and exact (oracle).

Rows supply, columns demand one unit each. In an image the rows are its ground truths, whose supply
is their units, and background, which supplies the rest (Dynamic Sparse R-CNN, arXiv 2205.02101,
section 3.1; OTA, arXiv 2103.14259, section 3.1).

Letters: ``R`` rows, ``P`` proposals; ``...`` any leading axes, all problems are solved at once.
"""

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ...structures import at_least_float32

__all__ = ["assign_exact", "column_error", "sinkhorn"]


# Scaling factors are multiplied into the potentials after this many sweeps, and plan entries below
# e^-60 count as zero in between. In the worst case a sweep raises an entry by about P squared,
# three sweeps with 1000 proposals by e^41: what was dropped would then still be below e^-18.
_SWEEPS_PER_UPDATE = 3
_LOG_NOTHING = -60.0


@torch.no_grad()
def sinkhorn(cost: Tensor, supply: Tensor, *, epsilon: float = 0.1, iterations: int = 50) -> Tensor:
    """Transport plan of least cost minus ``epsilon`` times its entropy (arXiv 1306.0895).

    A sweep scales the columns to their demand, then the rows to their supply, so row sums are exact
    and what has not converged shows in the column sums. The state is a potential, a logarithm, for
    each row and column; between its updates a few sweeps run on the plan itself, which is the same
    arithmetic without exponentials (stabilised scaling, arXiv 1610.06519 section 3.1), and many
    times faster: without it most of the time goes into entries too small for a normal float.

    In float32 whatever autocast says. A fixed number of sweeps without any decision on values:
    nothing waits for the device, and the whole can be compiled or captured in a CUDA graph.

    Args:
        cost: (..., R, P), finite wherever its row has supply.
        supply: (..., R), at least 0, summing to P. Rows of zero supply are ignored whatever their
            cost.
        epsilon: strength of the entropy, in units of the cost. Small is close to the exact plan and
            slow to converge.
        iterations: sweeps.

    Returns:
        (..., R, P), at least 0.
    """
    absent = supply <= 0
    with torch.autocast(cost.device.type, enabled=False):
        gain = at_least_float32(cost).masked_fill(absent.unsqueeze(-1), 0.0) / -epsilon
        supply = supply.to(gain.dtype)
        rows = torch.zeros_like(supply).masked_fill(absent, -torch.inf)
        columns = -(rows.unsqueeze(-1) + gain).logsumexp(dim=-2)  # log of a demand of 1 is 0
        rows = supply.log() - (columns.unsqueeze(-2) + gain).logsumexp(dim=-1)
        for done in range(1, iterations, _SWEEPS_PER_UPDATE):
            plan = _plan(rows, columns, gain)
            row_scale = torch.ones_like(rows)
            for _ in range(min(_SWEEPS_PER_UPDATE, iterations - done)):
                column_scale = (plan * row_scale.unsqueeze(-1)).sum(dim=-2).reciprocal()
                row_sum = (plan * column_scale.unsqueeze(-2)).sum(dim=-1)
                row_scale = supply / row_sum.masked_fill(absent, 1.0)
            rows, columns = rows + row_scale.log(), columns + column_scale.log()
        return _plan(rows, columns, gain)


def _plan(rows: Tensor, columns: Tensor, gain: Tensor) -> Tensor:
    log_plan = rows.unsqueeze(-1) + columns.unsqueeze(-2) + gain
    return log_plan.masked_fill(log_plan < _LOG_NOTHING, -torch.inf).exp()


def column_error(plan: Tensor) -> Tensor:
    """Largest difference of a column sum from its demand of 1: how far a plan is from converged.

    Args:
        plan: (..., R, P).

    Returns:
        (...).
    """
    return (plan.sum(dim=-2) - 1).abs().amax(dim=-1)


def assign_exact(cost: Tensor, supply: Tensor) -> Tensor:
    """The cheapest assignment of proposals to rows, on the host: what `sinkhorn` approximates.

    With whole supplies the plan of least cost is whole too: a linear assignment in which every row
    stands as often as it supplies.

    Args:
        cost: (R, P), finite wherever its row has supply.
        supply: (R,) whole numbers, summing to P.

    Returns:
        (P,) int64 on the device of `cost`, the row each proposal gets its unit from.

    Raises:
        ValueError: if supply and demand differ.
    """
    units = supply.long().cpu().numpy()
    if units.sum() != cost.shape[1]:
        raise ValueError(
            f"The supplies sum to {units.sum()}, but there are {cost.shape[1]} proposals; "
            "transport needs as much supply as demand."
        )
    # The largest supplier, usually background, need not be repeated: subtracting its cost from
    # every row changes no plan and leaves it free of cost, so it takes whatever the others leave.
    host = cost.cpu().double().numpy()
    slack = int(units.argmax())
    others = np.repeat(np.arange(len(units)), np.where(np.arange(len(units)) == slack, 0, units))
    copies, proposals = linear_sum_assignment(host[others] - host[slack])
    rows = np.full(cost.shape[1], slack, dtype=np.int64)
    rows[proposals] = others[copies]
    return torch.from_numpy(rows).to(cost.device)
