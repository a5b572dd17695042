"""Optimal transport from ground truths to proposals: entropic, and exact on the CPU.

Rows supply, columns demand one unit each. The rows of an image are its ground truths, whose supply
is their units, and background, which supplies the rest (Dynamic Sparse R-CNN, arXiv 2205.02101,
section 3.1; OTA, arXiv 2103.14259, section 3.1).

Notation: ``R`` rows; ``...`` any leading axes, all problems are solved at once.
"""

import numpy as np
import torch
from torch import Tensor

from ...structures import at_least_float32

# Scaling factors are multiplied into the potentials after this many iterations, and plan entries
# below e^-60 count as zero in between. In the worst case an iteration raises an entry by about P
# squared, three with 1000 proposals by e^41: dropped entries would then still be below e^-18.
_ITERATIONS_PER_UPDATE = 3
_LOG_ZERO = -60.0


@torch.no_grad()
def sinkhorn(cost: Tensor, supply: Tensor, *, epsilon: float = 0.1, iterations: int = 50) -> Tensor:
    """Transport plan of least cost minus ``epsilon`` times its entropy (arXiv 1306.0895).

    An iteration scales the columns to their demand, then the rows to their supply, so row sums are
    exact and column sums show the convergence. The state is a logarithmic potential for each row
    and column; between its updates a few iterations run on the plan itself, which is the same
    arithmetic without exponentials (stabilized scaling, arXiv 1610.06519 section 3.1) and many
    times faster: without it most of the time is spent on denormal entries.

    Computed in float32 also under autocast. The number of iterations is fixed and no decision
    depends on values: nothing synchronizes, and it can be compiled or captured in a CUDA graph.

    Args:
        cost: (..., R, P), finite wherever its row has supply.
        supply: (..., R), at least 0, summing to P. Rows without supply are ignored.
        epsilon: strength of the entropy, in units of the cost. Small values are close to the exact
            plan and slow to converge.
        iterations: Sinkhorn iterations.

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
        for done in range(1, iterations, _ITERATIONS_PER_UPDATE):
            plan = _plan(rows, columns, gain)
            row_scale = torch.ones_like(rows)
            for _ in range(min(_ITERATIONS_PER_UPDATE, iterations - done)):
                column_scale = (plan * row_scale.unsqueeze(-1)).sum(dim=-2).reciprocal()
                row_sum = (plan * column_scale.unsqueeze(-2)).sum(dim=-1)
                row_scale = supply / row_sum.masked_fill(absent, 1.0)
            rows, columns = rows + row_scale.log(), columns + column_scale.log()
        return _plan(rows, columns, gain)


def _plan(rows: Tensor, columns: Tensor, gain: Tensor) -> Tensor:
    log_plan = rows.unsqueeze(-1) + columns.unsqueeze(-2) + gain
    return log_plan.masked_fill(log_plan < _LOG_ZERO, -torch.inf).exp()


def column_error(plan: Tensor) -> Tensor:
    """Largest difference of a column sum of plans (..., R, P) from its demand of 1: (...)."""
    return (plan.sum(dim=-2) - 1).abs().amax(dim=-1)


def assign_exact(cost: Tensor, supply: Tensor) -> Tensor:
    """Exact assignment of least cost, on the CPU, which `sinkhorn` approximates.

    With integer supplies the plan of least cost is integer, too: a linear assignment in which every
    row is repeated as often as it supplies.

    Args:
        cost: (R, P), finite wherever its row has supply.
        supply: (R,) integers, summing to P.

    Returns:
        (P,) int64 on the device of `cost`: the row each proposal is assigned to.

    Raises:
        ValueError: if supply and demand differ.
    """
    from scipy.optimize import linear_sum_assignment  # half of the time of `import dsrcnn`

    units = supply.long().cpu().numpy()
    if units.sum() != cost.shape[1]:
        raise ValueError(
            f"The supplies sum to {units.sum()}, but there are {cost.shape[1]} proposals; "
            "transport needs as much supply as demand."
        )
    # The largest supplier, usually background, need not be repeated: with its cost subtracted from
    # every row, which changes no plan, it is free and takes all columns that are left.
    host = cost.cpu().double().numpy()
    slack = int(units.argmax())
    others = np.repeat(np.arange(len(units)), np.where(np.arange(len(units)) == slack, 0, units))
    copies, proposals = linear_sum_assignment(host[others] - host[slack])
    rows = np.full(cost.shape[1], slack, dtype=np.int64)
    rows[proposals] = others[copies]
    return torch.from_numpy(rows).to(cost.device)
