import torch

from dsrcnn.modeling.matching import (
    decide_exact,
    decide_rescaled,
    decide_top_units,
    limit_positives,
    repair_unmatched,
)


def test_rescaling_lets_a_small_supplier_win_against_a_large_one():
    # Background has more of every proposal, but the ground truth wants the second most.
    plan = torch.tensor([[0.1, 0.4, 0.2], [0.9, 0.6, 0.8]])
    assert decide_rescaled(plan).tolist() == [-1, 0, -1]


def test_a_favourite_of_several_rows_goes_to_the_one_that_sends_most_but_not_to_background():
    plan = torch.tensor([[0.3, 0.1, 0.0], [0.2, 0.0, 0.6], [0.4, 0.0, 0.1], [0.1, 0.1, 0.1]])
    # The second row ties with background only; the first proposal is contested by two rows.
    assert decide_rescaled(plan).tolist() == [2, -1, 1]
    plan = torch.tensor([[0.2, 0.1], [0.8, 0.8]])
    assert decide_rescaled(plan).tolist() == [0, -1]


def test_a_row_without_supply_wins_nothing():
    plan = torch.tensor([[0.0, 0.0], [0.7, 0.3], [0.3, 0.7]])
    assert decide_rescaled(plan).tolist() == [1, -1]


def test_top_units_takes_as_many_as_the_units_and_settles_contests_by_rescaled_value():
    plan = torch.tensor([[0.9, 0.8, 0.2, 0.1], [0.1, 0.6, 0.5, 0.1], [0.0, 0.0, 0.3, 0.8]])
    # Row 0 takes 0 and 1, row 1 takes 1 alone or 1 and 2; proposal 1 is worth 0.89 and 1.0.
    assert decide_top_units(plan, torch.tensor([2, 1])).tolist() == [0, 1, -1, -1]
    assert decide_top_units(plan, torch.tensor([2, 2])).tolist() == [0, 1, 1, -1]
    assert decide_top_units(plan, torch.tensor([0, 1])).tolist() == [-1, 1, -1, -1]


def test_exact_decisions_give_every_row_its_units():
    cost = torch.randn(2, 3, 5, 20)
    cost[..., -1, :] = 0
    supply = torch.tensor([3.0, 1, 4, 0, 12]).expand(2, 3, 5)
    found = decide_exact(cost, supply)
    for row, units in enumerate([3, 1, 4, 0]):
        assert ((found == row).sum(dim=-1) == units).all()


def test_a_limit_keeps_the_favourites():
    plan = torch.tensor([[0.9, 0.8, 0.1, 0.0], [0.1, 0.2, 0.1, 0.05], [0.0, 0.0, 0.5, 0.9]])
    assignment = torch.tensor([0, 0, 1, -1])  # entries 1, 0.89 and 0.5 of their rows
    for limit, kept in ((4, [0, 0, 1, -1]), (2, [0, 0, -1, -1]), (1, [0, -1, -1, -1])):
        assert limit_positives(assignment, plan, limit).tolist() == kept


def test_repair_gives_the_unmatched_their_best_free_proposal():
    # Ground truths 1 and 2 have none; both want proposal 1, then 3. Proposal 0 is taken.
    preference = torch.tensor([[9.0, 9, 9, 9], [9, 5, 1, 2], [9, 4, 0, 3]])
    assignment, wanting = torch.tensor([0, -1, -1, -1]), torch.tensor([True, True, True])
    assert repair_unmatched(assignment, preference, wanting, 0).tolist() == [0, -1, -1, -1]
    assert repair_unmatched(assignment, preference, wanting, 1).tolist() == [0, 1, -1, -1]
    assert repair_unmatched(assignment, preference, wanting, 2).tolist() == [0, 1, -1, 2]
    assert repair_unmatched(assignment, preference, wanting, 9).tolist() == [0, 1, -1, 2]


def test_repair_ignores_padding_and_a_lack_of_free_proposals():
    preference = torch.ones(3, 2)
    wanting = torch.tensor([True, False, True])
    assert repair_unmatched(torch.tensor([-1, -1]), preference, wanting, 5).tolist() == [0, 2]
    assert repair_unmatched(torch.tensor([0, 0]), preference, wanting, 5).tolist() == [0, 0]
