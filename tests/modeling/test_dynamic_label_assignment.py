"""DLA inside the model: losses, log, several settings."""

import pytest
import torch
from conftest import batch, tiny_cfg
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from dsrcnn.errors import ConfigError

SIZES = [(96, 128), (64, 96)]
DLA = ["MODEL.SparseRCNN.DLA.ENABLED", True]


def dla(*opts):
    return tiny_cfg(*DLA, *(f"MODEL.SparseRCNN.DLA.{x}" if isinstance(x, str) and x.isupper() else x
                            for x in opts))  # fmt: skip


@pytest.mark.parametrize(
    "matcher", ["OptimalTransportMatcher", "SimOTAMatcher", "HungarianMatcher"]
)
@pytest.mark.parametrize("counts", [[3, 0], [0, 0], [12, 30]])
def test_every_matcher_trains_whatever_the_number_of_objects(matcher, counts):
    model = build_model(dla("MATCHER", matcher))
    losses = model(batch(SIZES, counts))
    assert len(losses) == 6
    sum(losses.values()).backward()
    assert all(torch.isfinite(v) for v in losses.values())
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "opts", [["DECISION", "topk"], ["DECISION", "exact"], ["REPAIR", 2], ["STATIC_UNITS", 3],
             ["ROUNDING", "round"], ["ORDER", "cap_then_step"], ["NORMALIZER", "gt"]]
)  # fmt: skip
def test_every_option_trains(opts):
    model = build_model(dla(*opts))
    losses = model(batch(SIZES, [3, 2]))
    assert all(torch.isfinite(v) for v in losses.values())


def test_an_unknown_matcher_names_the_known_ones():
    with pytest.raises(ConfigError, match="'Sinkhorn'; write one of HungarianMatcher, Optimal"):
        build_model(dla("MATCHER", "Sinkhorn"))


def test_without_deep_supervision_only_the_last_stage_is_assigned():
    model = build_model(tiny_cfg(*DLA, "MODEL.SparseRCNN.DEEP_SUPERVISION", False))
    with EventStorage(19) as storage:
        losses = model(batch(SIZES, [3, 2]))
    assert set(losses) == {"loss_ce", "loss_bbox", "loss_giou"}
    assert "dla/positives" in storage.latest()
    assert "dla/positives_0" not in storage.latest()


def test_softmax_classification_works_with_dla():
    model = build_model(tiny_cfg(*DLA, "MODEL.SparseRCNN.USE_FOCAL", False))
    assert all(torch.isfinite(v) for v in model(batch(SIZES, [3, 2])).values())


def test_with_one_unit_and_the_exact_decision_the_losses_are_those_of_sparse_rcnn():
    plain = build_model(tiny_cfg("MODEL.SparseRCNN.NUM_PROPOSALS", 20)).double()
    same = build_model(
        tiny_cfg(
            *("MODEL.SparseRCNN.NUM_PROPOSALS", 20, *DLA, "MODEL.SparseRCNN.DLA.DECISION", "exact"),
            *("MODEL.SparseRCNN.DLA.STATIC_UNITS", 1, "MODEL.SparseRCNN.DLA.UNIT_STEP", 0.0),
        )
    ).double()
    same.load_state_dict(plain.state_dict())
    inputs = batch(SIZES, [5, 3])
    expected, found = plain(inputs), same(inputs)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)


def test_costs_have_weights_of_their_own():
    cfg = tiny_cfg("MODEL.SparseRCNN.CLASS_WEIGHT", 6.0)
    assert tuple(build_model(cfg).matcher.costs.weights) == (6.0, 5.0, 2.0)
    cfg = tiny_cfg(*DLA, "MODEL.SparseRCNN.CLASS_WEIGHT", 6.0, "MODEL.SparseRCNN.DLA.L1_COST", 1.0)
    model = build_model(cfg)
    assert tuple(model.matcher.costs.weights) == (2.0, 1.0, 2.0)
    assert tuple(model.criterion.weights) == (6.0, 5.0, 2.0)


def test_the_state_dict_is_that_of_sparse_rcnn():
    assert build_model(dla()).state_dict().keys() == build_model(tiny_cfg()).state_dict().keys()


def logged(*opts, iteration):
    model = build_model(dla(*opts))
    with EventStorage(iteration) as storage:
        model(batch(SIZES, [3, 2]))
    return {k: v[0] for k, v in storage.latest().items()}


def test_the_log_tells_positives_units_and_convergence_by_stage():
    found = logged("LOG_PERIOD", 20, iteration=19)
    names = ("positives", "unmatched", "units_mean", "units_max", "column_error")
    assert set(found) == {f"dla/{n}{s}" for n in names for s in ("", "_0")}
    assert found["dla/positives"] >= 1
    assert 1 <= found["dla/units_mean"] <= found["dla/units_max"]
    assert 0 <= found["dla/unmatched"] <= 2.5


@pytest.mark.parametrize("case", [("LOG_PERIOD", 20, 18), ("LOG_PERIOD", 0, 19)])
def test_between_its_periods_the_log_costs_nothing(case, monkeypatch):
    from dsrcnn.modeling.matching import Matcher

    monkeypatch.setattr(Matcher, "statistics", None)
    assert logged(*case[:2], iteration=case[2]) == {}


def test_without_a_trainer_there_is_no_log():
    assert len(build_model(dla())(batch(SIZES, [3, 2]))) == 6
