"""Recollection in training: with every other part of the model, and only there."""

import pytest
import torch
from conftest import batch, tiny_cfg
from detectron2.modeling import build_model
from recollection_scenes import DLA, PLAIN, SIZES, STAGES, inputs_of, model_of, sqr

from dsrcnn.engine.ema import AveragedWeights
from dsrcnn.errors import ConfigError


def test_recollection_is_switched_by_the_mode_not_by_gradients():
    model = model_of(*sqr()).train()
    features, proposals = inputs_of(model, 1)
    with torch.no_grad():
        assert len(model.head(features, proposals).stage) == 11


def test_losses_of_an_untrained_head_grow_with_the_groups():
    inputs = batch(SIZES[:2], [3, 2])
    six = ("MODEL.SparseRCNN.NUM_HEADS", 6)
    plain = sum(model_of(*PLAIN, *six).train()(inputs).values()).item()
    found = sum(model_of(*sqr(), *six).train()(inputs).values()).item()
    assert 4.5 < found / plain < 6.2  # 32 groups to 6


@pytest.mark.parametrize(
    "opts",
    [
        DLA,
        (*DLA, "MODEL.SparseRCNN.DLA.MATCHER", "SimOTAMatcher"),
        ("MODEL.SparseRCNN.DPG.ENABLED", True),
        (*DLA, "MODEL.SparseRCNN.DPG.ENABLED", True),
        ("MODEL.SparseRCNN.USE_FOCAL", False),
        ("MODEL.SparseRCNN.SQR.REDUCTION", "mean"),
        ("MODEL.CHECKPOINT.STAGES", True),
    ],
)
def test_recollection_trains_with(opts):
    torch.manual_seed(0)
    model = build_model(tiny_cfg(*sqr(), *opts))
    for counts in ([3, 2], [0, 1]):
        losses = model(batch(SIZES[:2], counts))
        assert len(losses) == 3 * STAGES
        sum(losses.values()).backward()
        assert all(torch.isfinite(v) for v in losses.values())
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_windows_from_a_config_replace_mode_and_start():
    written = "[[0, 1], [0, 2], [0, 4], [6, 8]]"
    model = build_model(tiny_cfg(*sqr("WINDOWS", written)))
    assert model.head.windows == ((0, 1), (0, 2), (0, 4), (6, 8))
    with pytest.raises(ConfigError, match=r"for stage 4; write \[start, 8\]"):
        build_model(tiny_cfg(*sqr("WINDOWS", written.replace("6, 8", "6, 9"))))


@pytest.mark.parametrize("detach", [True, False])
def test_experts_learn_features_from_all_stages_and_boxes_from_the_second_only_if_asked(detach):
    opts = sqr("DETACH_INIT_BOXES", detach)
    model = model_of(*opts, "MODEL.SparseRCNN.DPG.ENABLED", True).train()
    experts = [model.proposals.expert_features, model.proposals.expert_boxes]
    predictions = model.predict(batch(SIZES[:2], [1, 1]))[0]
    for stage, boxes_learn in ((0, True), (1, not detach), (2, False), (3, False)):
        of_stage = predictions.boxes[predictions.stage == stage].sum()
        features, boxes = torch.autograd.grad(
            of_stage, experts, allow_unused=True, retain_graph=True
        )
        assert features.any()
        assert (boxes is not None and bool(boxes.any())) == boxes_learn


def test_recollection_trains_in_bfloat16_with_averaged_weights():
    torch.manual_seed(0)
    model = build_model(tiny_cfg(*sqr(), *DLA)).train()
    average = AveragedWeights(model)
    average.start()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(batch(SIZES[:2], [3, 2]))
    assert all(torch.isfinite(v) for v in losses.values())
    sum(losses.values()).backward()
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    average.update()
    assert list(average.weights()) == list(before)
    decay = 2 / 11  # (1 + n) / (10 + n) after one update
    for name, after in model.state_dict().items():
        expected = torch.lerp(after, before[name], decay)
        torch.testing.assert_close(average.weights()[name], expected)
    name = "head.head_series.3.class_logits.weight"
    assert not torch.equal(average.weights()[name], before[name])
