"""DLA inside the model: losses, settings, matchers of a user, statistics in the log."""

from unittest import mock

import pytest
import torch
from conftest import batch, tiny_cfg
from detectors import DLA, SIZES, enable, model_of, options, train_step
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from dsrcnn.errors import ConfigError
from dsrcnn.modeling.matching import MATCHER_REGISTRY, HungarianMatcher, matcher, optimal_transport
from tests.matching.scenes import ExactTransportMatcher

INPUTS = batch(SIZES, [3, 2])


@pytest.fixture
def registry(monkeypatch):
    """The registry of matchers; what a test registers is gone after it."""
    monkeypatch.setattr(MATCHER_REGISTRY, "_obj_map", {**MATCHER_REGISTRY._obj_map})
    return MATCHER_REGISTRY


@pytest.mark.parametrize("name", ["OptimalTransportMatcher", "SimOTAMatcher", "HungarianMatcher"])
@pytest.mark.parametrize("counts", [[3, 0], [0, 0], [12, 30]])
def test_every_matcher_trains_with_any_number_of_objects(name, counts):
    assert len(train_step(model_of(*enable("DLA", "MATCHER", name)), batch(SIZES, counts))) == 6


@pytest.mark.parametrize(
    ("key", "value"), [("DLA.STATIC_UNITS", 3), ("DLA.NORMALIZER", "gt"), ("USE_FOCAL", False)]
)
def test_every_option_trains(key, value):
    train_step(model_of(*DLA, *options(key, value)), INPUTS)


def test_an_unknown_matcher_is_refused_with_the_known_names():
    with pytest.raises(ConfigError, match="'Sinkhorn'; write one of HungarianMatcher, Optimal"):
        model_of(*enable("DLA", "MATCHER", "Sinkhorn"))


@pytest.mark.parametrize("one_to_many", [True, False])
def test_a_registered_matcher_is_selected_and_decides_about_nms(registry, one_to_many):
    @registry.register()
    class MyMatcher(HungarianMatcher):
        pass

    MyMatcher.one_to_many = one_to_many
    model = model_of(*enable("DLA", "MATCHER", "MyMatcher"))
    assert type(model.matcher) is MyMatcher
    assert model.detection.nms_threshold == (0.7 if one_to_many else None)
    train_step(model, INPUTS)


def test_exact_transport_of_one_unit_per_object_gives_the_losses_of_sparse_rcnn(registry):
    registry.register(ExactTransportMatcher)
    exact = enable("DLA", "MATCHER", "ExactTransportMatcher", "STATIC_UNITS", 1, "UNIT_STEP", 0.0)
    expected, *others = (
        model_of(*options("NUM_PROPOSALS", 20), *opts).double()(batch(SIZES, [5, 3]))
        for opts in ([], exact, [*exact, *options("DLA.NORMALIZER", "gt")])
    )
    for losses in others:
        torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)


def test_costs_have_weights_apart_from_the_losses():
    plain = model_of(*options("CLASS_WEIGHT", 6.0))
    model = model_of(*enable("DLA", "L1_COST", 1.0), *options("CLASS_WEIGHT", 6.0))
    assert tuple(plain.matcher.costs.weights) == (6.0, 5.0, 2.0)
    assert tuple(model.matcher.costs.weights) == (2.0, 1.0, 2.0)
    assert tuple(model.criterion.weights) == (6.0, 5.0, 2.0)
    assert model.state_dict().keys() == plain.state_dict().keys()


def logged(*opts, iteration=19):
    with EventStorage(iteration) as storage:
        build_model(tiny_cfg(*opts))(INPUTS)
    return {k.removeprefix("dla/"): v[0] for k, v in storage.latest().items()}


def test_statistics_of_every_stage_are_logged_from_the_only_sinkhorn_of_the_step():
    sinkhorn = optimal_transport.sinkhorn
    with mock.patch.object(optimal_transport, "sinkhorn", wraps=sinkhorn) as spy:
        scalars = logged(*DLA)
    assert spy.call_count == 1
    names = ("positives", "unmatched", "units_mean", "units_max", "column_error")
    assert set(scalars) == {n + s for n in names for s in ("", "_0")}
    assert scalars["positives"] >= 1
    assert 1 <= scalars["units_mean"] <= scalars["units_max"]
    assert 0 <= scalars["unmatched"] <= 2.5


def test_without_deep_supervision_only_the_last_stage_is_assigned():
    scalars = logged(*DLA, *options("DEEP_SUPERVISION", False))
    assert "positives" in scalars
    assert "positives_0" not in scalars


@pytest.mark.parametrize(("period", "iteration"), [(20, 18), (0, 19)])
def test_between_its_periods_nothing_is_counted_or_logged(period, iteration, monkeypatch):
    monkeypatch.setattr(matcher, "_count", None)
    monkeypatch.setattr(optimal_transport, "column_error", None)
    assert logged(*DLA, "LOG.PERIOD", period, iteration=iteration) == {}


def test_nothing_is_logged_without_dla_or_without_gradients():
    assert logged() == {}
    with torch.no_grad():  # batch norm statistics are being estimated
        assert logged(*DLA) == {}
