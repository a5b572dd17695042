"""DPG: proposals mixed from experts for every image."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import batch, tiny_cfg
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from dsrcnn.config import read_cfg
from dsrcnn.errors import ConfigError
from dsrcnn.modeling import DynamicSparseRCNN
from dsrcnn.modeling.proposals import (
    DynamicProposals,
    TemperatureSchedule,
    initial_boxes,
    mixing_statistics,
)
from dsrcnn.modeling.proposals.staircase import StairStep, climb, resize_nearest

DPG = ["MODEL.SparseRCNN.DPG.ENABLED", True, "MODEL.SparseRCNN.DPG.HIDDEN", 16]
SIZES = [(64, 96), (96, 64)]


def dpg(*opts):
    return tiny_cfg(*DPG, *opts)


def source(**kwargs):
    defaults = {"num_proposals": 6, "channels": 8, "hidden": 16, "resize": 5, "norm": ""}
    defaults["temperature"] = TemperatureSchedule(1.0, 1.0, 0)
    return DynamicProposals(**{**defaults, **kwargs})


def pyramid(images=2, height=64, width=96, channels=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = [(images, channels, height // s, width // s) for s in (4, 8, 16, 32)]
    return [torch.randn(s, generator=g) for s in shapes]


def sizes(images=2, height=64, width=96):
    return torch.tensor([[width, height, width, height]] * images, dtype=torch.float32)


# Mixing


@pytest.mark.parametrize("tau", [0.01, 1.0, 30.0, 1e6])
def test_weights_are_a_distribution_over_the_experts(tau):
    weights = source(temperature=TemperatureSchedule(tau, tau, 0)).weights(pyramid(), sizes())
    assert weights.shape == (2, 4, 6)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(2, 6))


def test_a_high_temperature_gives_equal_weights_and_a_low_one_picks_an_expert():
    model = source()
    model.temperature = TemperatureSchedule(1e8, 1e8, 0)
    torch.testing.assert_close(model.weights(pyramid(), sizes()), torch.full((2, 4, 6), 0.25))
    model.temperature = TemperatureSchedule(1e-8, 1e-8, 0)
    weights = model.weights(pyramid(), sizes())
    picked = F.one_hot(model.logits(pyramid(), sizes()).argmax(dim=1), 4).mT.float()
    torch.testing.assert_close(weights, picked)


def test_the_same_weights_mix_boxes_and_features():
    model = source(box_jitter=0.1).eval()
    weights = model.weights(pyramid(), sizes())
    boxes, features = model(pyramid(), sizes())
    for b, p in ((0, 0), (1, 5)):
        mixed = sum(weights[b, e, p] * model.expert_features[e, p] for e in range(4))
        torch.testing.assert_close(features[b, p], mixed)
        cx, cy, w, h = sum(weights[b, e, p] * model.expert_boxes[e, p] for e in range(4))
        expected = torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]) * sizes()[0]
        torch.testing.assert_close(boxes[b, p], expected)


def test_a_mixed_box_lies_between_those_of_its_experts():
    model = source(box_jitter=0.2)
    boxes = torch.einsum("bep,epc->bpc", model.weights(pyramid(), sizes()), model.expert_boxes)
    low, high = model.expert_boxes.amin(dim=0), model.expert_boxes.amax(dim=0)
    assert (boxes >= low - 1e-6).all()
    assert (boxes <= high + 1e-6).all()


def test_every_proposal_is_another_one():
    """The failure of the public attempt: experts shared by all proposals, at most four of them."""
    features = source(num_proposals=40)(pyramid(), sizes()).features[0]
    distances = torch.cdist(features, features) + 1e3 * torch.eye(40)
    assert distances.min() > 0.1


def test_images_get_different_proposals_unless_the_last_layer_is_zero():
    for zero_init in (False, True):
        found = source(zero_init=zero_init)(pyramid(), sizes()).features
        assert torch.allclose(found[0], found[1]) == zero_init
    torch.testing.assert_close(found[0], source_mean(zero_init=True))


def source_mean(**kwargs):
    torch.manual_seed(0)
    model = source(**kwargs)
    return model.expert_features.mean(dim=0)


@pytest.fixture(autouse=True)
def _same_start(monkeypatch):
    original = DynamicProposals.__init__
    monkeypatch.setattr(
        DynamicProposals, "__init__", lambda *a, **k: (torch.manual_seed(0), original(*a, **k))[1]
    )


def test_with_default_settings_the_first_weights_are_far_from_a_choice():
    """Guards against a softmax of a sum over a thousand channels without temperature."""
    cfg = read_cfg("coco/sparse_rcnn_R50_300pro_3x", ["MODEL.SparseRCNN.DPG.ENABLED", True])
    model = DynamicProposals(cfg)
    features = [0.5 * x for x in pyramid(height=256, width=320, channels=256)]
    entropies = []
    for temperature in (model.temperature, TemperatureSchedule(1.0, 1.0, 0)):
        model.temperature = temperature
        weights = model.weights(features, sizes(height=256, width=320))
        entropy = -(weights * weights.clamp(min=1e-20).log()).sum(dim=1) / torch.tensor(4.0).log()
        entropies.append(entropy.mean().item())
    assert entropies[0] > 0.3
    assert entropies[1] < 0.3


# Network


@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_staircase_halves_and_collects_the_levels(reduce):
    steps = torch.nn.ModuleList(StairStep(8 * i, "") for i in (1, 2, 3))
    features = pyramid(1, 800, 1344)
    assert [f.shape[2:] for f in features] == [(200, 336), (100, 168), (50, 84), (25, 42)]
    found = climb(features, steps)
    assert found.shape == (1, 32, 25, 42)
    assert torch.equal(found[:, 24:], features[3])
    x = F.relu(steps[0].conv(features[0]))
    x = F.relu(steps[1].conv(torch.cat([x, features[1]], dim=1)))
    x = F.relu(steps[2].conv(torch.cat([x, features[2]], dim=1)))
    torch.testing.assert_close(found[:, :24], x)


def test_the_whole_network_is_what_the_paper_says():
    """Staircase, resize to a square, sum over channels, two linear layers; in this order."""
    model = source(resize=30)
    features = pyramid()
    square = F.interpolate(climb(features, model.stair), size=(30, 30))
    hidden = F.relu(model.fc1(square.sum(dim=1).flatten(1)))
    expected = model.fc2(hidden).view(2, 4, 6)
    torch.testing.assert_close(model.logits(features, sizes()), expected, rtol=1e-4, atol=1e-4)


def test_without_staircase_every_level_is_resized_by_itself():
    model = source(staircase=False)
    features = pyramid()
    square = torch.cat([F.interpolate(f, size=(5, 5)) for f in features], dim=1).sum(dim=1)
    expected = model.fc2(F.relu(model.fc1(square.flatten(1)))).view(2, 4, 6)
    torch.testing.assert_close(model.logits(features, sizes()), expected, rtol=1e-4, atol=1e-4)
    assert len(model.stair) == 0


@pytest.mark.parametrize("extent", [(1, 1), (7, 11), (30, 30), (25, 42), (100, 64)])
def test_resizing_is_nearest_neighbour(extent):
    maps = torch.randn(2, *extent)
    expected = F.interpolate(maps.double().unsqueeze(1), size=(30, 30)).squeeze(1).float()
    found = resize_nearest(maps, 30)
    assert (found == expected).float().mean() > 0.93  # theirs rounds a float, ours divides integers


def test_resizing_the_valid_part_equals_resizing_it_alone():
    maps, valid = torch.randn(2, 9, 12), torch.tensor([[9, 7], [4, 12]])
    found = resize_nearest(maps, 30, valid)
    assert torch.equal(found[0], resize_nearest(maps[:1, :9, :7], 30)[0])
    assert torch.equal(found[1], resize_nearest(maps[1:, :4, :12], 30)[0])


@pytest.mark.parametrize("norm", ["", "BN", "FrozenBN", "GN"])
def test_every_norm_builds_and_trains(norm):
    model = build_model(dpg("MODEL.SparseRCNN.DPG.NORM", norm))
    sum(model(batch(SIZES, [2, 1])).values()).backward()
    assert all(p.grad is not None for p in model.proposals.parameters())


def test_parameter_counts_are_the_published_ones():
    """Reference 4.4: what DPG adds to 300 proposals of R50."""
    opts = ["MODEL.SparseRCNN.DPG.ENABLED", True]
    proposals = DynamicProposals(read_cfg("coco/sparse_rcnn_R50_300pro_3x", opts))
    parts = {n: sum(p.numel() for p in m.parameters()) for n, m in proposals.named_children()}
    assert parts == {"stair": 13_824 + 3_072, "fc1": 1_351_500, "fc2": 1_801_200}
    total = sum(p.numel() for p in proposals.parameters())
    assert total - 300 * 260 == 3_403_596


# Temperature


def test_temperature_falls_linearly_and_stays_at_its_end():
    schedule = TemperatureSchedule(30.0, 1.0, 100)
    steps = torch.tensor([0, 50, 100, 1000])
    assert [schedule.at(s).item() for s in steps] == pytest.approx([30.0, 15.5, 1.0, 1.0])
    assert TemperatureSchedule(30.0, 1.0, 0).at(steps[0]).item() == 1.0


def test_every_training_step_counts_evaluation_does_not_and_uses_the_end():
    model = source(temperature=TemperatureSchedule(30.0, 1.0, 10))
    for expected in (30.0, 27.1, 24.2):
        assert model.current_temperature().item() == pytest.approx(expected)
        model(pyramid(), sizes())
    model.eval()
    assert model.current_temperature().item() == pytest.approx(1.0)
    model(pyramid(), sizes())
    assert model.step == 3


def test_a_resumed_model_has_the_temperature_it_had():
    first, second = (build_model(dpg("MODEL.SparseRCNN.DPG.TAU_ITERS", 10)) for _ in range(2))
    for _ in range(3):
        first(batch(SIZES, [2, 1]))
    second.load_state_dict(first.state_dict())
    assert first.proposals.step == second.proposals.step == 3
    now = first.proposals.current_temperature()
    assert second.proposals.current_temperature() == now
    assert now.item() == pytest.approx(30 - 29 * 0.3)


# Statistics


def test_statistics_know_a_choice_from_a_mixture_and_an_image_from_another():
    equal = torch.full((3, 4, 6), 0.25)
    choice = torch.zeros(3, 4, 6)
    choice[:, 1] = 1
    each = torch.zeros(2, 4, 6)
    each[0, 0], each[1, 3] = 1, 1
    for weights, entropy, variation, least, most in (
        (equal, 1, 0, 0.25, 0.25),
        (choice, 0, 0, 0, 1),
        (each, 0, 1, 0, 0.5),
        (torch.cat([equal[:1], choice[:1]]), 0.5, 0.75, 0.125, 0.625),
    ):
        found = {k: v.item() for k, v in mixing_statistics(weights).items()}
        assert found == pytest.approx(
            {"entropy": entropy, "variation": variation, "least_used": least, "most_used": most},
            abs=1e-6,
        )


def test_the_training_log_tells_temperature_and_mixture():
    model = build_model(dpg("MODEL.SparseRCNN.DPG.LOG_PERIOD", 20))
    for iteration, names in ((18, set()), (19, {"tau", "entropy", "variation"})):
        with EventStorage(iteration) as storage:
            model(batch(SIZES, [2, 1]))
        logged = {k.removeprefix("dpg/"): v[0] for k, v in storage.latest().items()}
        assert names <= set(logged)
    assert logged["tau"] == pytest.approx(30, rel=1e-3)
    assert 0 <= logged["variation"] <= 1


# In the model


def test_the_papers_name_is_the_same_model():
    name = ["MODEL.META_ARCHITECTURE", "DynamicSparseRCNN", "MODEL.SparseRCNN.DLA.ENABLED", True]
    model = build_model(dpg(*name))
    assert isinstance(model, DynamicSparseRCNN)
    assert model.state_dict().keys() == build_model(dpg()).state_dict().keys()
    assert len(model(batch(SIZES, [2, 0]))) == 6


def test_keys_are_those_of_a_static_model_but_for_the_proposals():
    static, dynamic = build_model(tiny_cfg()).state_dict(), build_model(dpg()).state_dict()
    own = {k for k in dynamic if k.startswith("proposal_generator.")}
    assert {"proposal_generator.expert_boxes", "proposal_generator.step"} <= own
    assert {"proposal_generator.fc2.weight", "proposal_generator.stair.2.conv.weight"} <= own
    proposals = {"init_proposal_boxes.weight", "init_proposal_features.weight"}
    assert set(dynamic) - own == set(static) - proposals


def test_a_static_checkpoint_becomes_every_expert_and_detects_the_same():
    static, dynamic = build_model(tiny_cfg()).eval(), build_model(dpg()).eval()
    report = dynamic.load_state_dict(static.state_dict(), strict=False)
    assert not report.unexpected_keys
    assert all(k.startswith("proposal_generator.") for k in report.missing_keys)
    assert not any("expert" in k for k in report.missing_keys)
    assert torch.equal(
        dynamic.proposals.expert_boxes[2], static.proposals.init_proposal_boxes.weight
    )
    inputs = batch(SIZES, [0, 0])
    with torch.no_grad():
        for a, b in zip(static.predict(inputs)[0], dynamic.predict(inputs)[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


def test_noise_tells_tiled_experts_apart():
    static, noisy = (
        build_model(tiny_cfg()),
        build_model(dpg("MODEL.SparseRCNN.DPG.TILING_NOISE", 0.1)),
    )
    noisy.load_state_dict(static.state_dict(), strict=False)
    deviation = noisy.proposals.expert_features - static.proposals.init_proposal_features.weight
    assert deviation.std().item() == pytest.approx(0.1, rel=0.1)
    assert torch.equal(noisy.proposals.expert_boxes[0], static.proposals.init_proposal_boxes.weight)


def test_a_static_checkpoint_with_another_number_of_proposals_is_not_tiled():
    static = build_model(tiny_cfg("MODEL.SparseRCNN.NUM_PROPOSALS", 5))
    report = build_model(dpg()).load_state_dict(static.state_dict(), strict=False)
    assert "init_proposal_boxes.weight" in report.unexpected_keys
    assert "proposal_generator.expert_boxes" in report.missing_keys


def test_one_expert_is_the_static_model_and_its_network_learns_nothing():
    model = build_model(dpg("MODEL.SparseRCNN.DPG.NUM_EXPERTS", 1))
    sum(model(batch(SIZES, [2, 1])).values()).backward()
    for parameter in (model.proposals.fc1.weight, model.proposals.fc2.weight):
        assert parameter.grad.abs().max() == 0
    assert model.proposals.expert_features.grad.abs().max() > 0


def test_losses_reach_experts_and_network():
    model = build_model(dpg())
    sum(model(batch(SIZES, [2, 1])).values()).backward()
    for name, parameter in model.proposals.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_with_the_valid_region_an_image_has_the_same_proposals_alone_and_in_a_batch():
    inputs = batch([(64, 64), (128, 160)], [0, 0])
    for valid_region in (True, False):
        model = build_model(dpg("MODEL.SparseRCNN.DPG.VALID_REGION", valid_region)).eval()
        model.proposals.fc2.weight.data.mul_(30)
        seen = []
        model.proposals.register_forward_hook(lambda m, i, out, seen=seen: seen.append(out))
        with torch.no_grad():
            model(inputs), model(inputs[:1])
        same = torch.allclose(seen[0].features[0], seen[1].features[0], atol=0.05)
        assert same == valid_region


def test_boxes_stay_float32_under_autocast():
    model = build_model(dpg())
    with torch.autocast("cpu", torch.bfloat16):
        predictions, _, _ = model.predict(batch(SIZES, [2, 1]))
        proposals = model.proposals([x.bfloat16() for x in pyramid(channels=32)], sizes())
    assert predictions.boxes.dtype == proposals.boxes.dtype == torch.float32


def test_a_copied_model_is_the_same():
    model = build_model(dpg()).eval()
    inputs = batch(SIZES, [0, 0])
    with torch.no_grad():
        first, second = model(inputs), copy.deepcopy(model)(inputs)
    assert torch.equal(first[0]["instances"].scores, second[0]["instances"].scores)


# Initial boxes


@pytest.mark.parametrize("count", [1, 5, 50, 300])
@pytest.mark.parametrize("mode", ["image", "center", "grid", "random"])
def test_initial_boxes_lie_inside_the_image(mode, count):
    centre, size = initial_boxes(mode, count).split(2, dim=1)
    assert len(centre) == count
    assert (size > 0).all()
    assert (centre - size / 2 >= -1e-6).all()
    assert (centre + size / 2 <= 1 + 1e-6).all()


def test_a_grid_covers_the_image_once():
    boxes = initial_boxes("grid", 9)
    assert boxes[:, 2:].prod(dim=1).sum().item() == pytest.approx(1)
    assert boxes[0].tolist() == pytest.approx([1 / 6, 1 / 6, 1 / 3, 1 / 3])
    assert boxes[5].tolist() == pytest.approx([5 / 6, 0.5, 1 / 3, 1 / 3])


def test_an_unknown_start_is_refused():
    with pytest.raises(ConfigError, match="'corner'; write one of image, center, grid, random"):
        initial_boxes("corner", 3)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_config_chooses_where_boxes_start(enabled):
    cfg = tiny_cfg(
        "MODEL.SparseRCNN.DPG.ENABLED", enabled, "MODEL.SparseRCNN.PROPOSALS.BOXES", "grid"
    )
    boxes = build_model(cfg).proposals(pyramid(channels=32), sizes()).boxes
    assert (boxes[0, :, 2] - boxes[0, :, 0]).max() < 96 / 2
