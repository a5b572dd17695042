"""Windows, routes and gradients of recollection, against the tables of the method."""

import pytest
import torch

from dsrcnn.errors import ConfigError
from dsrcnn.modeling.decoder.sqr import (
    GroupMemory,
    check_windows,
    plain_windows,
    recollection_windows,
    routes_of,
)

# start: the windows' starts and ends for six stages, as the reference implementations list them.
TABLE = {
    1: ("0 0 1 2 4 7", "1 2 4 7 12 20", 32),
    2: ("0 1 1 2 3 5", "1 2 3 5 8 13", 20),
    3: ("0 1 2 2 3 4", "1 2 3 4 6 9", 13),
    4: ("0 1 2 3 3 4", "1 2 3 4 5 7", 9),
    5: ("0 1 2 3 4 4", "1 2 3 4 5 6", 7),
    6: ("0 1 2 3 4 5", "1 2 3 4 5 6", 6),
}


def pairs(starts, ends):
    return [tuple(map(int, p)) for p in zip(starts.split(), ends.split(), strict=True)]


def counts(windows):
    return [w.end - w.start for w in windows]


@pytest.mark.parametrize("start", TABLE)
def test_windows_of_six_stages(start):
    starts, ends, total = TABLE[start]
    windows = recollection_windows(6, start=start)
    assert list(windows) == pairs(starts, ends)
    assert sum(counts(windows)) == total


def test_windows_of_other_depths_and_of_dense_recollection():
    expected = pairs("0 0 1 2 4 7 12", "1 2 4 7 12 20 33")
    assert list(recollection_windows(7)) == expected
    assert counts(recollection_windows(3)) == [1, 2, 3]
    assert counts(recollection_windows(4)) == [1, 2, 3, 5]
    dense = recollection_windows(6, dense=True)
    assert list(dense) == pairs("0 0 0 0 0 0", "1 2 4 8 16 32")
    assert recollection_windows(6, start=6) == plain_windows(6)


def test_routes():
    words = [
        [" ".join(map(str, r)) for r in of_stage] for of_stage in routes_of(recollection_windows(6))
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
    for stage, routes in enumerate(routes_of(recollection_windows(6, start=start, dense=dense)), 1):
        assert routes[-1] == tuple(range(1, stage + 1))
        assert len(set(routes)) == len(routes)


@pytest.mark.parametrize(
    ("windows", "loss", "by_weight"),
    [
        (plain_windows(6), 6, "6 5 4 3 2 1"),
        (recollection_windows(6, start=1), 32, "20 24 21 20 16 13"),
        (recollection_windows(6, start=2), 20, "20 12 14 12 10 8"),
        (recollection_windows(6, start=3), 13, "13 12 7 8 6 5"),
        (recollection_windows(6, start=4), 9, "9 8 7 4 4 3"),
        (recollection_windows(6, start=5), 7, "7 6 5 4 2 2"),
        (recollection_windows(7, start=1), 53, "33 40 36 35 32 26 21"),
        (recollection_windows(6, dense=True), 63, "32 32 32 32 32 32"),
    ],
)
def test_stages_that_multiply_by_a_weight_have_the_gradients_of_the_table(windows, loss, by_weight):
    weights = torch.ones(len(windows), requires_grad=True)
    first = torch.ones(1, 1, 1, 1, requires_grad=True)
    memory = GroupMemory(windows, torch.zeros(1, 1, 1, 4), first)
    total = 0.0
    for stage, weight in enumerate(weights):
        boxes, features = memory.window(stage)
        assert boxes.shape[1] == features.shape[1] == windows[stage].end - windows[stage].start
        memory.add(stage, boxes, features * weight)
        total = total + (features * weight).sum()
    total.backward()
    assert total.item() == loss
    assert first.grad.item() == loss
    assert weights.grad.tolist() == [float(x) for x in by_weight.split()]


def test_windows_may_begin_in_the_middle_of_a_stages_groups():
    windows = check_windows([[0, 1], [0, 2], [3, 4], [1, 5]], 4)
    memory = GroupMemory(windows, torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 1))
    seen = []
    for stage in range(4):
        boxes, features = memory.window(stage)
        seen.append(features.flatten().tolist())
        numbers = [float(10 * (stage + 1) + i) for i in range(features.shape[1])]
        memory.add(stage, boxes, torch.tensor(numbers).view(1, -1, 1, 1))
    # Groups 0 | 10 | 20 21 | 30: the third stage takes the second group of the second stage only.
    assert seen == [[0], [0, 10], [21], [10, 20, 21, 30]]


def test_what_no_later_stage_wants_is_forgotten():
    windows = recollection_windows(6)
    memory = GroupMemory(windows, torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 1))
    for stage in range(6):
        boxes, features = memory.window(stage)
        memory.add(stage, boxes, features)
        assert len(memory._blocks) <= 2
    assert not memory._blocks


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ([[0, 1]], r"has 1 windows; write one for each of the 3 stages"),
        ([[0, 1], [0, 3], [1, 4]], r"\[0, 3\] for stage 2; write \[start, 2\]"),
        ([[0, 1], [2, 2], [1, 3]], r"\[2, 2\] for stage 2; write \[start, 2\] .* from 0 to 1"),
        ([[0, 1], [0, 2], [-1, 4]], r"\[-1, 4\] for stage 3"),
        ([[0, 1], [0, 1], [0, 2]], r"\[0, 1\] for stage 2"),
        ([[0, 1], [0], [0, 2]], r"\[0\] for stage 2"),
        ([0, 1, 2], r"has 0 for stage 1; write \[start, end\]"),
        ([[0, 1], [0.5, 2], [1, 3]], r"\[0.5, 2\] for stage 2; write \[start, end\], whole num"),
        ([["a", 1], [0, 2], [1, 3]], r"\['a', 1\] for stage 1"),
    ],
)
def test_windows_that_cannot_be_are_refused(written, words):
    with pytest.raises(ConfigError, match=words):
        check_windows(written, 3)
