import itertools

import pytest
import torch
from scipy.optimize import linear_sum_assignment, linprog

from dsrcnn.modeling.matching import (
    assign_exact,
    column_error,
    decide_exact,
    decide_rescaled,
    decide_top_units,
    sinkhorn,
)

# Two ground truths and background, four proposals.
COST = torch.tensor(
    [[-1.0, -0.5, 0.3, 1.0], [0.8, -0.9, -0.4, 0.2], [0, 0, 0, 0]], dtype=torch.float64
)


def random_problem(rows=6, proposals=40, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    cost = torch.randn(rows, proposals, generator=g, dtype=dtype) * 2
    cost[-1] = 0
    units = torch.randint(1, 5, (rows - 1,), generator=g)
    supply = torch.cat([units, proposals - units.sum(dim=0, keepdim=True)])
    return cost, supply.to(dtype)


@pytest.mark.parametrize(
    ("supply", "plan", "assignment"),
    [
        (
            [1, 1, 2],
            [
                [0.974599, 0.025280, 0.000121, 0.000000],
                [0.000000, 0.912346, 0.087416, 0.000237],
                [0.016728, 0.064397, 0.915737, 1.003138],
            ],
            [0, 1, -1, -1],
        ),
        (
            [2, 1, 1],
            [
                [1.000437, 0.819929, 0.176235, 0.003398],
                [0.000000, 0.180392, 0.778785, 0.040823],
                [0.000001, 0.000070, 0.045150, 0.954779],
            ],
            [0, 0, 1, -1],
        ),
    ],
)
def test_plan_and_decisions_are_those_worked_out_elsewhere(supply, plan, assignment):
    supply = torch.tensor(supply, dtype=torch.float64)
    found = sinkhorn(COST, supply)
    torch.testing.assert_close(found, torch.tensor(plan, dtype=torch.float64), atol=1e-6, rtol=0)
    assert decide_rescaled(found).tolist() == assignment
    assert decide_top_units(found, supply[:-1].long()).tolist() == assignment
    assert decide_exact(COST, supply).tolist() == assignment


def test_one_sweep_has_the_values_worked_out_elsewhere():
    found = sinkhorn(COST, torch.tensor([1.0, 1, 2], dtype=torch.float64), iterations=1)
    first, last = [0.981432, 0.017651, 0.000878, 0.000039], [0.000101, 0.000270, 0.039983, 1.959647]
    torch.testing.assert_close(found[0], torch.tensor(first).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(found[2], torch.tensor(last).double(), atol=1e-6, rtol=0)


def by_logarithms(cost, supply, *, epsilon, iterations):
    """The definition: every sweep on logarithms, one problem at a time."""
    u, v = torch.zeros_like(supply), torch.zeros_like(cost[0])
    for _ in range(iterations):
        v = -epsilon * torch.logsumexp((u.unsqueeze(1) - cost) / epsilon, dim=0)
        u = epsilon * (supply.log() - torch.logsumexp((v - cost) / epsilon, dim=1))
    return ((u.unsqueeze(1) + v - cost) / epsilon).exp()


@pytest.mark.parametrize("iterations", [1, 2, 5, 6, 7, 50, 123])
@pytest.mark.parametrize("epsilon", [0.5, 0.1, 0.003])
@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0])
def test_plan_is_that_of_sweeps_on_logarithms(iterations, epsilon, spread):
    cost, supply = random_problem()
    settings = {"epsilon": epsilon, "iterations": iterations}
    expected = by_logarithms(cost * spread, supply, **settings)
    torch.testing.assert_close(
        sinkhorn(cost * spread, supply, **settings), expected, atol=1e-9, rtol=1e-7
    )


def test_float32_is_as_exact_as_sweeps_on_logarithms_in_float32():
    cost, supply = random_problem(rows=21, proposals=300)
    exact = sinkhorn(cost, supply)
    torch.testing.assert_close(
        sinkhorn(cost.float(), supply.float()).double(), exact, atol=2e-5, rtol=1e-4
    )


@pytest.mark.parametrize("proposals", [300, 900])
@pytest.mark.parametrize("iterations", [6, 11, 20, 50])
def test_plan_is_right_where_every_column_is_fought_for(proposals, iterations):
    """All proposals prefer the one object, so potentials move as far as they ever do."""
    cost = torch.stack([-8 * torch.linspace(0, 1, proposals) ** 0.05, torch.zeros(proposals)])
    supply = torch.tensor([1.0, proposals - 1])
    expected = by_logarithms(cost.double(), supply.double(), epsilon=0.1, iterations=iterations)
    found = sinkhorn(cost.double(), supply.double(), iterations=iterations)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_exact_assignment_is_the_optimum_of_the_linear_program(seed):
    cost, supply = random_problem(rows=4, proposals=12, seed=seed)
    rows, columns = cost.shape
    sums = torch.zeros(rows + columns, rows * columns)
    for r, c in itertools.product(range(rows), range(columns)):
        sums[r, r * columns + c] = sums[rows + c, r * columns + c] = 1
    totals = torch.cat([supply, torch.ones(columns, dtype=supply.dtype)])
    best = linprog(cost.flatten(), A_eq=sums, b_eq=totals).x.reshape(rows, columns)
    assert assign_exact(cost, supply).tolist() == best.argmax(axis=0).tolist()


@pytest.mark.parametrize("iterations", [1, 3, 50])
def test_rows_are_exact_after_any_number_of_sweeps(iterations):
    cost, supply = random_problem()
    plan = sinkhorn(cost, supply, iterations=iterations)
    torch.testing.assert_close(plan.sum(dim=-1), supply, atol=1e-5, rtol=0)
    assert (plan >= 0).all()


def test_columns_approach_their_demand_sweep_by_sweep():
    cost, supply = random_problem()
    errors = [
        (sinkhorn(cost, supply, iterations=n).sum(dim=0) - 1).abs().sum().item()
        for n in (1, 2, 4, 8, 16, 32, 64, 2000)
    ]
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < errors[0] / 1000


def test_column_error_is_the_largest_of_the_columns():
    plan = torch.tensor([[[0.5, 0.2, 0.0], [0.5, 0.9, 0.7]], [[1.0, 1, 1], [0, 0, 0]]])
    assert column_error(plan).tolist() == pytest.approx([0.3, 0.0], abs=1e-6)


def test_permuting_rows_or_proposals_permutes_the_plan():
    cost, supply = random_problem()
    plan = sinkhorn(cost, supply)
    rows, proposals = torch.randperm(6), torch.randperm(40)
    found = sinkhorn(cost[rows][:, proposals], supply[rows])
    torch.testing.assert_close(found, plan[rows][:, proposals])


@pytest.mark.parametrize("iterations", [1, 7, 50])
def test_adding_to_a_column_changes_nothing(iterations):
    cost, supply = random_problem()
    shifted = cost + torch.randn(40, dtype=torch.float64) * 3
    torch.testing.assert_close(
        sinkhorn(shifted, supply, iterations=iterations),
        sinkhorn(cost, supply, iterations=iterations),
    )


def test_adding_to_a_row_changes_nothing_once_converged():
    cost, supply = random_problem()
    shifted = cost + torch.randn(6, 1, dtype=torch.float64) * 2
    torch.testing.assert_close(
        sinkhorn(shifted, supply, epsilon=0.5, iterations=5000),
        sinkhorn(cost, supply, epsilon=0.5, iterations=5000),
        atol=1e-6,
        rtol=0,
    )


def test_scaling_costs_and_epsilon_alike_changes_nothing():
    cost, supply = random_problem()
    torch.testing.assert_close(sinkhorn(cost * 7, supply, epsilon=0.7), sinkhorn(cost, supply))


@pytest.mark.parametrize("seed", range(5))
def test_small_epsilon_and_many_sweeps_give_the_exact_assignment(seed):
    cost, supply = random_problem(seed=seed)
    plan = sinkhorn(cost, supply, epsilon=0.01, iterations=5000)
    assert torch.equal(plan.argmax(dim=0), assign_exact(cost, supply))


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
def test_rows_without_supply_are_ignored_whatever_their_cost(garbage):
    cost, supply = random_problem()
    padded = torch.cat([cost[:2], torch.full((3, 40), garbage).double(), cost[2:]])
    plan = sinkhorn(padded, torch.cat([supply[:2], torch.zeros(3).double(), supply[2:]]))
    assert (plan[2:5] == 0).all()
    torch.testing.assert_close(torch.cat([plan[:2], plan[5:]]), sinkhorn(cost, supply))


def test_many_problems_at_once_equal_one_by_one():
    problems = [random_problem(seed=s, dtype=torch.float32) for s in range(6)]
    costs, supplies = (torch.stack(x).view(2, 3, *x[0].shape) for x in zip(*problems, strict=True))
    plans = sinkhorn(costs, supplies).flatten(0, 1)
    for plan, problem in zip(plans, problems, strict=True):
        torch.testing.assert_close(plan, sinkhorn(*problem), atol=1e-5, rtol=1e-4)


def test_background_alone_takes_everything():
    plan = sinkhorn(torch.zeros(1, 5), torch.tensor([5.0]))
    torch.testing.assert_close(plan, torch.ones(1, 5))


def test_half_precision_costs_are_solved_in_float32():
    cost, supply = random_problem(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = sinkhorn(cost.bfloat16(), supply)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, sinkhorn(cost.bfloat16().float(), supply))


def test_exact_assignment_is_the_cheapest_of_all():
    """Every way of giving 4 proposals to rows of supply 1, 2 and 1."""
    cost, supply = COST, torch.tensor([1.0, 2.0, 1.0])
    best = min(
        set(itertools.permutations([0, 1, 1, 2])),
        key=lambda rows: sum(cost[r, p] for p, r in enumerate(rows)),
    )
    assert assign_exact(cost, supply).tolist() == list(best)


@pytest.mark.parametrize("seed", range(5))
def test_exact_assignment_equals_the_linear_assignment_with_repeated_rows(seed):
    cost, supply = random_problem(seed=seed)
    repeated = cost.repeat_interleave(supply.long(), dim=0)
    rows, columns = linear_sum_assignment(repeated.numpy())
    owner = torch.arange(6).repeat_interleave(supply.long())
    expected = torch.empty(40, dtype=torch.int64)
    expected[torch.from_numpy(columns)] = owner[torch.from_numpy(rows)]
    assert torch.equal(assign_exact(cost, supply), expected)


def test_supply_that_is_not_the_demand_is_refused():
    with pytest.raises(ValueError, match="sum to 3, but there are 4 proposals"):
        assign_exact(COST, torch.tensor([1, 1, 1]))
