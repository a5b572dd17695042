import itertools

import pytest
import torch
from scipy.optimize import linprog

from dsrcnn.modeling.matching import assign_exact, assign_from_plan, column_error, sinkhorn

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


@pytest.mark.parametrize(("supply", "expected", "assignment"), [
    ([1, 1, 2], [[0.974599, 0.025280, 0.000121, 0.000000],
                 [0.000000, 0.912346, 0.087416, 0.000237],
                 [0.016728, 0.064397, 0.915737, 1.003138]], [0, 1, 2, 2]),
    ([2, 1, 1], [[1.000437, 0.819929, 0.176235, 0.003398],
                 [0.000000, 0.180392, 0.778785, 0.040823],
                 [0.000001, 0.000070, 0.045150, 0.954779]], [0, 0, 1, 2]),
])  # fmt: skip
def test_plan_and_assignments_agree_with_an_independent_calculation(supply, expected, assignment):
    supply = torch.tensor(supply, dtype=torch.float64)
    plan = sinkhorn(COST, supply)
    torch.testing.assert_close(plan, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)
    assert [r % 3 for r in assign_from_plan(plan).tolist()] == assignment  # background is -1
    assert assign_exact(COST, supply).tolist() == assignment


def log_domain_plan(cost, supply, *, epsilon=0.1, iterations=50):
    """The definition: every iteration on logarithms, one problem at a time."""
    u, v = torch.zeros_like(supply), torch.zeros_like(cost[0])
    for _ in range(iterations):
        v = -epsilon * torch.logsumexp((u.unsqueeze(1) - cost) / epsilon, dim=0)
        u = epsilon * (supply.log() - torch.logsumexp((v - cost) / epsilon, dim=1))
    return ((u.unsqueeze(1) + v - cost) / epsilon).exp()


@pytest.mark.parametrize("iterations", [1, 2, 5, 6, 7, 50, 123])
@pytest.mark.parametrize("epsilon", [0.5, 0.1, 0.003])
@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0])
def test_plan_agrees_with_iterations_on_logarithms(iterations, epsilon, spread):
    cost, supply = random_problem()
    settings = {"epsilon": epsilon, "iterations": iterations}
    expected = log_domain_plan(cost * spread, supply, **settings)
    plan = sinkhorn(cost * spread, supply, **settings)
    torch.testing.assert_close(plan, expected, atol=1e-9, rtol=1e-7)


def test_float32_plan_is_accurate_also_under_autocast():
    cost, supply = random_problem(rows=21, proposals=300)
    plan = sinkhorn(cost.float(), supply.float())
    torch.testing.assert_close(plan.double(), sinkhorn(cost, supply), atol=2e-5, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        half = sinkhorn(cost.bfloat16(), supply.float())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, sinkhorn(cost.bfloat16().float(), supply.float()))


@pytest.mark.parametrize("proposals", [300, 900])
@pytest.mark.parametrize("iterations", [6, 11, 20, 50])
def test_plan_is_accurate_where_all_proposals_prefer_one_ground_truth(proposals, iterations):
    """Potentials move as far as they ever do."""
    cost = torch.stack([-8 * torch.linspace(0, 1, proposals) ** 0.05, torch.zeros(proposals)])
    problem = cost.double(), torch.tensor([1.0, proposals - 1]).double()
    expected = log_domain_plan(*problem, iterations=iterations)
    plan = sinkhorn(*problem, iterations=iterations)
    torch.testing.assert_close(plan, expected, atol=1e-6, rtol=1e-6)


def test_rows_are_exact_after_every_iteration_and_columns_approach_their_demand():
    cost, supply = random_problem()
    errors = []
    for iterations in (1, 2, 3, 4, 8, 16, 32, 50, 64, 2000):
        plan = sinkhorn(cost, supply, iterations=iterations)
        assert (plan >= 0).all()
        torch.testing.assert_close(plan.sum(dim=-1), supply, atol=1e-5, rtol=0)
        errors.append((plan.sum(dim=0) - 1).abs().sum().item())
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < errors[0] / 1000


def test_column_error_is_the_largest_of_the_columns():
    plan = torch.tensor([[[0.5, 0.2, 0.0], [0.5, 0.9, 0.7]], [[1.0, 1, 1], [0, 0, 0]]])
    assert column_error(plan).tolist() == pytest.approx([0.3, 0.0], abs=1e-6)


def test_permuting_rows_or_proposals_permutes_the_plan_and_adding_to_them_changes_nothing():
    (cost, supply), close = random_problem(), torch.testing.assert_close
    rows, proposals = torch.randperm(6), torch.randperm(40)
    permuted = sinkhorn(cost[rows][:, proposals], supply[rows])
    close(permuted, sinkhorn(cost, supply)[rows][:, proposals])
    close(sinkhorn(cost * 7, supply, epsilon=0.7), sinkhorn(cost, supply))
    shifted = cost + torch.randn(40).double() * 3
    for n in (1, 7, 50):
        close(sinkhorn(shifted, supply, iterations=n), sinkhorn(cost, supply, iterations=n))
    settings = {"epsilon": 0.5, "iterations": 5000}  # with rows, at convergence only
    shifted = sinkhorn(cost + torch.randn(6, 1).double() * 2, supply, **settings)
    close(shifted, sinkhorn(cost, supply, **settings), atol=1e-6, rtol=0)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
def test_rows_without_supply_are_ignored_whatever_their_cost(garbage):
    cost, supply = random_problem()
    padded = torch.cat([cost[:2], torch.full((3, 40), garbage).double(), cost[2:]])
    plan = sinkhorn(padded, torch.cat([supply[:2], torch.zeros(3).double(), supply[2:]]))
    assert (plan[2:5] == 0).all()
    torch.testing.assert_close(torch.cat([plan[:2], plan[5:]]), sinkhorn(cost, supply))


def test_many_problems_at_once_agree_with_one_by_one():
    problems = [random_problem(seed=s, dtype=torch.float32) for s in range(6)]
    costs, supplies = (torch.stack(x).view(2, 3, *x[0].shape) for x in zip(*problems, strict=True))
    plans = sinkhorn(costs, supplies).flatten(0, 1)
    for plan, problem in zip(plans, problems, strict=True):
        torch.testing.assert_close(plan, sinkhorn(*problem), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("rows", "proposals"), [(4, 12), (6, 40)])
def test_exact_assignment_is_the_optimum_of_the_linear_program(rows, proposals, seed):
    cost, supply = random_problem(rows, proposals, seed)
    sums = torch.zeros(rows + proposals, rows * proposals)
    for r, c in itertools.product(range(rows), range(proposals)):
        sums[r, r * proposals + c] = sums[rows + c, r * proposals + c] = 1
    totals = torch.cat([supply, torch.ones(proposals, dtype=supply.dtype)])
    c, a, b = (x.numpy() for x in (cost.flatten(), sums, totals))
    best = linprog(c, A_eq=a, b_eq=b).x.reshape(rows, proposals)
    assert assign_exact(cost, supply).tolist() == best.argmax(axis=0).tolist()


def test_supply_that_differs_from_the_demand_is_refused():
    with pytest.raises(ValueError, match="sum to 3, but there are 4 proposals"):
        assign_exact(COST, torch.tensor([1, 1, 1]))
