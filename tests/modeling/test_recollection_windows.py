"""Windows, routes and gradients of recollection agree with the tables of the method."""

import pytest
import torch

from dsrcnn.modeling.decoder.sqr import GroupMemory, plain_windows, recollection_windows, routes_of

# start: starts and ends of the windows of six stages, as the reference implementations list them,
# their groups, and the gradients of `test_gradients_of_stages_that_multiply_by_a_weight`.
TABLE = {
    1: ("0 0 1 2 4 7", "1 2 4 7 12 20", 32, "20 24 21 20 16 13"),
    2: ("0 1 1 2 3 5", "1 2 3 5 8 13", 20, "20 12 14 12 10 8"),
    3: ("0 1 2 2 3 4", "1 2 3 4 6 9", 13, "13 12 7 8 6 5"),
    4: ("0 1 2 3 3 4", "1 2 3 4 5 7", 9, "9 8 7 4 4 3"),
    5: ("0 1 2 3 4 4", "1 2 3 4 5 6", 7, "7 6 5 4 2 2"),
    6: ("0 1 2 3 4 5", "1 2 3 4 5 6", 6, "6 5 4 3 2 1"),
}


def pairs(starts, ends):
    return [tuple(map(int, p)) for p in zip(starts.split(), ends.split(), strict=True)]


def counts(windows):
    return [w.stop - w.first for w in windows]


@pytest.mark.parametrize("start", TABLE)
def test_windows_of_six_stages(start):
    starts, ends, total, _ = TABLE[start]
    windows = recollection_windows(6, num_plain_stages=start)
    assert list(windows) == pairs(starts, ends)
    assert sum(counts(windows)) == total


def test_windows_of_other_depths_and_of_dense_recollection():
    expected = pairs("0 0 1 2 4 7 12", "1 2 4 7 12 20 33")
    assert list(recollection_windows(7)) == expected
    assert counts(recollection_windows(3)) == [1, 2, 3]
    assert counts(recollection_windows(4)) == [1, 2, 3, 5]
    dense = recollection_windows(6, dense=True)
    assert list(dense) == pairs("0 0 0 0 0 0", "1 2 4 8 16 32")
    assert recollection_windows(6, num_plain_stages=6) == plain_windows(6)


def test_routes_of_six_stages():
    words = [
        [" ".join(map(str, r)) for r in routes] for routes in routes_of(recollection_windows(6))
    ]
    assert words[0] == ["1"]
    assert words[1] == ["2", "1 2"]
    assert words[2] == ["1 3", "2 3", "1 2 3"]
    assert words[3] == ["2 4", "1 2 4", "1 3 4", "2 3 4", "1 2 3 4"]
    five = ["1 3 5", "2 3 5", "1 2 3 5", "2 4 5", "1 2 4 5", "1 3 4 5", "2 3 4 5", "1 2 3 4 5"]
    assert words[4] == five
    assert words[5] == [f"{route} 6" for route in words[3] + words[4]]


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("start", range(1, 7))
def test_the_last_route_of_every_stage_is_the_plain_cascade(start, dense):
    windows = recollection_windows(6, num_plain_stages=start, dense=dense)
    for stage, routes in enumerate(routes_of(windows), 1):
        assert routes[-1] == tuple(range(1, stage + 1))
        assert len(set(routes)) == len(routes)


@pytest.mark.parametrize(("windows", "loss", "by_weight"), [
    *((recollection_windows(6, num_plain_stages=n), *row[2:]) for n, row in TABLE.items()),
    (recollection_windows(7), 53, "33 40 36 35 32 26 21"),
    (recollection_windows(6, dense=True), 63, "32 32 32 32 32 32"),
])  # fmt: skip
def test_gradients_of_stages_that_multiply_by_a_weight(windows, loss, by_weight):
    weights = torch.ones(len(windows), requires_grad=True)
    first = torch.ones(1, 1, 1, 1, requires_grad=True)
    memory = GroupMemory(windows, torch.zeros(1, 1, 1, 4), first)
    total = 0.0
    for stage, weight in enumerate(weights):
        boxes, features = memory.window(stage)
        assert boxes.shape[1] == features.shape[1] == len(range(*windows[stage]))
        memory.add(stage, boxes, features * weight)
        total = total + (features * weight).sum()
    total.backward()
    assert total.item() == first.grad.item() == loss
    assert weights.grad.tolist() == [float(x) for x in by_weight.split()]


def test_groups_that_no_later_stage_refines_are_released():
    memory = GroupMemory(recollection_windows(6), torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 1))
    for stage in range(6):
        memory.add(stage, *memory.window(stage))
        assert len(memory._blocks) <= 2
    assert not memory._blocks
