import pytest
import torch

from benchmarks.matching import compare_matchers, make_scene
from benchmarks.reference_matching import assign_by_loop
from dsrcnn.errors import ConfigError
from dsrcnn.modeling.matching import CostSettings, OptimalTransportMatcher, UnitRule


@pytest.mark.parametrize("objects", [1, 5, 60, 90, 120])
def test_the_batched_matcher_gives_what_the_plain_loop_gives(objects):
    """Full focal costs, a background cost and one Sinkhorn loop per problem: a second method."""
    predictions, targets = make_scene(6, 2, 100, objects, 12, torch.device("cpu"))
    targets.mask[1, objects // 2 :] = False  # images with different numbers of objects
    rule = UnitRule(num_stages=6)
    found = OptimalTransportMatcher(costs=CostSettings(), units=rule)(predictions, targets)
    expected = assign_by_loop(predictions, targets, rule)
    assert (found != expected).sum() <= 2  # rounding may tip a tie
    assert (expected >= 0).sum() >= 6 * min(objects, 80)


def test_the_comparison_names_all_matchers_and_a_factor():
    lines = compare_matchers(stages=2, images=1, proposals=20, objects=3, repeats=3).splitlines()
    names = [line.split("|")[1].strip() for line in lines[2:]]
    assert names == ["transport, batched", "transport, loop", "Hungarian"]
    assert float(lines[3].split("|")[3]) == 1.0


def test_settings_that_the_plain_loop_does_not_know_are_refused():
    predictions, targets = make_scene(1, 1, 10, 2, 3, torch.device("cpu"))
    with pytest.raises(ValueError, match="does not know"):
        assign_by_loop(predictions, targets, UnitRule(1, rounding="round"))


def test_a_comparison_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="--objects is 0"):
        compare_matchers(objects=0)
