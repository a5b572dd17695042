"""DPG in the detector: checkpoints, gradients, batches, training steps and the log."""

import copy

import pytest
import torch
from conftest import batch, tiny_cfg
from detectors import (
    DPG,
    SIZES,
    enable,
    model_of,
    options,
    pyramid,
    sizes,
    source,
    train_step,
    wake,
    weights_of,
)
from detectron2.utils.events import EventStorage

from dsrcnn.config import check_config
from dsrcnn.errors import ConfigError
from dsrcnn.modeling import DynamicSparseRCNN
from dsrcnn.modeling.proposals import (
    PROPOSALS_REGISTRY,
    ContentQueries,
    DynamicProposals,
    LearnedProposals,
)
from dsrcnn.utils.training import use_training_context

INPUTS = batch(SIZES, [2, 1])
ANNEALED = options("DPG.TAU_START", 30.0, "DPG.TAU_END", 4.0, "DPG.TAU_ITERS", 10)


def test_the_name_of_the_paper_builds_the_same_model():
    named = model_of(*DPG, *enable("DLA"), "MODEL.META_ARCHITECTURE", "DynamicSparseRCNN")
    assert isinstance(named, DynamicSparseRCNN)
    assert named.state_dict().keys() == model_of(*DPG).state_dict().keys()
    assert len(train_step(named, batch(SIZES, [2, 0]))) == 6


def test_the_config_selects_a_registered_source_of_proposals(monkeypatch):
    monkeypatch.setattr(PROPOSALS_REGISTRY, "_obj_map", {**PROPOSALS_REGISTRY._obj_map})

    @PROPOSALS_REGISTRY.register()
    class MyProposals(LearnedProposals):
        pass

    @PROPOSALS_REGISTRY.register()
    class MyDynamicProposals(DynamicProposals):
        pass

    for opts, expected in (
        ([], LearnedProposals),
        (DPG, DynamicProposals),
        (options("PROPOSALS.NAME", "ContentQueries"), ContentQueries),
        (options("PROPOSALS.NAME", "MyProposals"), MyProposals),
        ([*DPG, *options("PROPOSALS.NAME", "MyDynamicProposals")], MyDynamicProposals),
    ):
        model = model_of(*opts)
        assert type(model.proposals) is expected
        train_step(model, INPUTS)


@pytest.mark.parametrize(("opts", "words"), [
    (options("PROPOSALS.NAME", "Anchors"), "'Anchors'; write one of ContentQueries, DenseD"),
    ([*DPG, *options("PROPOSALS.NAME", "LearnedProposals")],
     "'LearnedProposals', but MODEL.SparseRCNN.DPG.ENABLED is True"),
])  # fmt: skip
def test_unknown_proposals_and_those_without_dpg_are_refused(opts, words):
    with pytest.raises(ConfigError, match=f"MODEL.SparseRCNN.PROPOSALS.NAME is {words}"):
        model_of(*opts)


def test_keys_are_those_of_a_static_model_except_for_the_proposals():
    static, dynamic = model_of().state_dict(), model_of(*DPG).state_dict()
    generator = {k for k in dynamic if k.startswith("proposal_generator.")}
    expected = ("expert_boxes", "step", "fc2.weight", "stair.2.conv.weight")
    assert {f"proposal_generator.{name}" for name in expected} <= generator
    proposals = {"init_proposal_boxes.weight", "init_proposal_features.weight"}
    assert set(dynamic) - generator == set(static) - proposals


@torch.no_grad()
def assert_same_predictions(first, second, **tolerance):
    first, second = (m.raw_predictions(INPUTS)[0][:2] for m in (first, second))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def test_a_static_checkpoint_is_tiled_over_the_experts_and_detects_the_same():
    static, dynamic = model_of().eval(), model_of(*DPG, seed=1).eval()
    wake(dynamic.proposals)
    report = dynamic.load_state_dict(static.state_dict(), strict=False)
    assert not report.unexpected_keys
    assert all(k.startswith("proposal_generator.") for k in report.missing_keys)
    assert not any("expert" in k for k in report.missing_keys)
    initial = static.proposals.init_proposal_boxes.weight
    assert torch.equal(dynamic.proposals.expert_boxes[2], initial)
    assert_same_predictions(static, dynamic, rtol=1e-4, atol=1e-3)


def test_queries_of_adamixer_are_tiled_over_the_experts_and_detect_the_same():
    adamixer = ["MODEL.META_ARCHITECTURE", "AdaMixer"]
    static, dynamic = model_of(*adamixer).eval(), model_of(*adamixer, *DPG, seed=1).eval()
    with torch.no_grad():  # as after training, not standardized
        static.proposals.init_proposal_features.weight.mul_(3).add_(1)
    wake(dynamic.proposals)
    report = dynamic.load_state_dict(static.state_dict(), strict=False)
    assert not any("expert" in k for k in report.missing_keys)
    assert_same_predictions(static, dynamic, rtol=1e-4, atol=1e-3)


def test_levels_coarser_than_the_padding_are_summed_as_far_as_they_go():
    levels = ["MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p3", "p4", "p5", "p6"]]
    model = model_of(*enable("DPG", "HIDDEN", 16, "STAIRCASE", False), *levels)
    losses = model(batch([(96, 96), (64, 90)], [2, 1]))  # p6 of 96 pixels stands for 128
    assert all(torch.isfinite(value) for value in losses.values())


def test_tiling_noise_separates_experts_equally_on_all_processes():
    static, experts = model_of(), []
    for seed in (0, 7):  # of two processes
        noisy = model_of(*enable("DPG", "TILING_NOISE", 0.1), seed=seed)
        noisy.load_state_dict(static.state_dict(), strict=False)
        experts.append(noisy.proposals)
    assert torch.equal(experts[0].expert_features, experts[1].expert_features)
    deviation = experts[0].expert_features - static.proposals.init_proposal_features.weight
    assert deviation.std().item() == pytest.approx(0.1, rel=0.1)
    assert torch.equal(experts[0].expert_boxes[0], static.proposals.init_proposal_boxes.weight)


def test_a_static_checkpoint_with_another_number_of_proposals_is_resized_and_tiled():
    static = model_of(*options("NUM_PROPOSALS", 5))
    dynamic = model_of(*DPG)
    dynamic.load_state_dict(static.state_dict(), strict=False)
    boxes, tiled = static.proposals.init_proposal_boxes.weight, dynamic.proposals.expert_boxes
    assert torch.equal(tiled[:, :5], boxes.expand(len(tiled), -1, -1))
    torch.testing.assert_close(tiled[0, 5:], boxes[: tiled.shape[1] - 5], rtol=0, atol=0.02)


def test_one_expert_is_the_static_model_and_its_network_gets_no_gradient():
    model, static = model_of(*enable("DPG", "NUM_EXPERTS", 1)), model_of()
    model.load_state_dict(static.state_dict(), strict=False)
    wake(model.proposals)
    assert_same_predictions(model, static, rtol=1e-5, atol=1e-4)
    train_step(model, INPUTS)
    for parameter in (model.proposals.fc1.weight, model.proposals.fc2.weight):
        assert parameter.grad.abs().max() == 0
    assert model.proposals.expert_features.grad.abs().max() > 0


@pytest.mark.parametrize("norm", ["none", "BN", "SyncBN", "FrozenBN", "GN"])
def test_losses_train_experts_and_network_with_every_norm(norm):
    model = model_of(*DPG, *options("DPG.NORM", norm))
    wake(model.proposals)
    train_step(model, INPUTS)
    for name, parameter in model.proposals.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_group_norms_of_the_staircase_need_channels_of_whole_groups():
    width = [*options("HIDDEN_DIM", 48, "NHEADS", 4), "MODEL.FPN.OUT_CHANNELS", 48]
    cfg = tiny_cfg(*enable("DPG", "NORM", "GN"), *width)
    with pytest.raises(ConfigError, match="HIDDEN_DIM is 48, but GN needs a multiple of 32"):
        check_config(cfg)
    cfg.MODEL.SparseRCNN.DPG.NORM = "BN"
    check_config(cfg)


def test_images_of_equal_padded_size_have_the_same_proposals_alone_and_in_a_batch():
    model = model_of(*DPG).eval()
    wake(model.proposals)
    inputs, weights = batch([(64, 90), (60, 96)], [0, 0]), []
    for images in (model.preprocess_image(x) for x in (inputs, inputs[:1])):
        with torch.no_grad():
            features = model.extract_features(images)
            weights.append(weights_of(model.proposals, features, images.sizes)[0])
    torch.testing.assert_close(*weights, atol=1e-5, rtol=0)


def test_strides_follow_the_levels_in_use():
    levels = ["MODEL.ROI_HEADS.IN_FEATURES", ["p3", "p4", "p5"]]
    model = model_of(*DPG, *levels)
    assert model.proposals.strides == [8, 16, 32]
    assert all(torch.isfinite(v) for v in model(INPUTS).values())


def test_boxes_stay_float32_under_autocast():
    model = model_of(*DPG)
    with torch.autocast("cpu", torch.bfloat16):
        predictions, _ = model.raw_predictions(INPUTS)
        proposals = model.proposals([x.bfloat16() for x in pyramid(channels=32)], sizes())
    assert predictions.boxes.dtype == proposals.boxes.dtype == torch.float32


@pytest.mark.parametrize("opts", [[], DPG], ids=["static", "dynamic"])
def test_the_config_selects_the_initial_boxes(opts):
    model = model_of(*opts, *options("PROPOSALS.BOXES", "grid"))
    boxes = model.proposals(pyramid(channels=32), sizes()).boxes
    assert (boxes[0, :, 2] - boxes[0, :, 0]).max() < 96 / 2


def test_only_complete_training_iterations_advance_the_temperature():
    model = model_of(*DPG)
    with use_training_context(ends_iteration=False):
        model(INPUTS)
    with torch.no_grad():  # batch norm statistics are being estimated
        model(INPUTS)
    model.eval()(INPUTS)
    assert model.proposals.step == 0
    model.train()(INPUTS)
    assert model.proposals.step == 1


def test_a_resumed_model_continues_with_the_saved_temperature():
    first, second = (model_of(*DPG, *ANNEALED) for _ in range(2))
    for _ in range(3):
        first(INPUTS)
    second.load_state_dict(first.state_dict())
    assert first.proposals.step == second.proposals.step == 3
    temperature = first.proposals.current_temperature()
    assert second.proposals.current_temperature() == temperature
    assert temperature.item() == pytest.approx(30 - 26 * 0.3)


NAMES = {"tau", "gain", "entropy", "variation", "box_variation", "dead", "spread"}


def test_temperature_gain_and_mixture_are_logged_every_period():
    model = model_of(*DPG)
    for iteration, names in ((18, set()), (19, NAMES)):
        with EventStorage(iteration) as storage:
            model(INPUTS)
        logged = {k.removeprefix("dpg/"): v[0] for k, v in storage.latest().items()}
        assert set(logged) == names
    assert logged["tau"] == 1
    assert 0 <= logged["variation"] <= 1
    # Logits of standardized, independent inputs would vary by the gain.
    weight = wake(model.proposals).fc2.weight
    with EventStorage(19) as storage:
        model(INPUTS)
    gain = storage.latest()["dpg/gain"][0]
    assert gain == pytest.approx(weight.square().mean().sqrt().item(), rel=0.05)


def test_the_pyramid_gets_no_gradient_from_the_network():
    model, features = model_of(*DPG), [x.requires_grad_() for x in pyramid(channels=32)]
    boxes, mixed = wake(model.proposals)(features, sizes())
    loss = boxes.sum() + mixed.square().sum()
    assert torch.autograd.grad(loss, model.proposals.fc1.weight, retain_graph=True)[0].any()
    assert torch.autograd.grad(loss, features, allow_unused=True) == (None,) * 4


def test_training_and_evaluation_mix_alike():
    model = source(hidden=64)  # without batch norms in the staircase
    inputs = pyramid(4), sizes(4)
    for seed in range(20):
        model(pyramid(4, seed=seed), sizes(4))
    trained = copy.deepcopy(model)(*inputs)
    torch.testing.assert_close(model.eval()(*inputs), trained)
    alone = [model([x[i : i + 1] for x in inputs[0]], inputs[1][:1]).features for i in range(4)]
    torch.testing.assert_close(torch.cat(alone), trained.features)
