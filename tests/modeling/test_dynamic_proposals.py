"""DPG: proposals mixed from experts for every image."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import batch, tiny_cfg
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from dsrcnn.config import read_cfg
from dsrcnn.modeling import DynamicSparseRCNN
from dsrcnn.modeling.proposals import (
    DynamicProposals,
    TemperatureSchedule,
    mixing_statistics,
)
from dsrcnn.modeling.proposals.staircase import StairStep, climb, resize_nearest

DPG = ["MODEL.SparseRCNN.DPG.ENABLED", True, "MODEL.SparseRCNN.DPG.HIDDEN", 16]
SIZES = [(64, 96), (96, 64)]


def dpg(*opts):
    return tiny_cfg(*DPG, *opts)


def source(**kwargs):
    defaults = {"num_proposals": 6, "channels": 8, "hidden": 16, "resize": 5, "norm": "none"}
    defaults |= {"temperature": TemperatureSchedule(1.0, 1.0, 0), "logit_norm": False}
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
    model = source(box_jitter=0.2).eval()
    x1, y1, x2, y2 = (model(pyramid(), sizes()).boxes / sizes().unsqueeze(1)).unbind(-1)
    boxes = torch.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], dim=-1)
    low, high = model.expert_boxes.amin(dim=0), model.expert_boxes.amax(dim=0)
    assert (high - low).max() > 0.2
    assert (boxes >= low - 1e-5).all()
    assert (boxes <= high + 1e-5).all()


@pytest.mark.parametrize("boxes", ["image", "center", "grid", "random"])
def test_jitter_turns_no_box_inside_out(boxes):
    model = source(box_jitter=0.5, boxes=boxes, num_proposals=300)
    assert (model.expert_boxes[..., 2:] > 0).all()
    assert model.expert_boxes.std(dim=0).max() > 0


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


def test_without_standardizing_only_the_temperature_keeps_the_first_weights_from_a_choice():
    """The paper's sum over a thousand channels; the public attempt has no temperature."""
    opts = ["MODEL.SparseRCNN.DPG.ENABLED", True, "MODEL.SparseRCNN.DPG.STANDARDIZE", False]
    opts += ["MODEL.SparseRCNN.DPG.LOGIT_NORM", False]
    model = DynamicProposals(read_cfg("coco/sparse_rcnn_R50_300pro_3x", opts))
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
    steps = torch.nn.ModuleList(StairStep(8 * i, "none") for i in (1, 2, 3))
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
    seen = square.sum(dim=1).flatten(1)
    seen = (seen - seen.mean(dim=1, keepdim=True)) / seen.std(dim=1, keepdim=True, correction=0)
    hidden = F.relu(model.fc1(seen))
    expected = model.fc2(hidden).view(2, 4, 6)
    torch.testing.assert_close(model.logits(features, sizes()), expected, rtol=1e-4, atol=1e-4)


def test_without_staircase_every_level_is_resized_by_itself():
    model = source(staircase=False, standardize=False)
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


@pytest.mark.parametrize("norm", ["none", "BN", "SyncBN", "FrozenBN", "GN"])
def test_every_norm_builds_and_trains(norm):
    model = build_model(dpg("MODEL.SparseRCNN.DPG.NORM", norm))
    sum(model(batch(SIZES, [2, 1])).values()).backward()
    assert all(p.grad is not None for p in model.proposals.parameters())


def test_parameter_counts_are_the_published_ones():
    """Reference 4.4: what DPG adds to 300 proposals of R50."""
    opts = ["MODEL.SparseRCNN.DPG.ENABLED", True]
    proposals = DynamicProposals(read_cfg("coco/sparse_rcnn_R50_300pro_3x", opts))
    parts = {n: sum(p.numel() for p in m.parameters()) for n, m in proposals.named_children()}
    assert parts.pop("logit_norm") == 0
    assert parts == {"stair": 13_824 + 3_072, "fc1": 1_351_500, "fc2": 1_801_200}
    total = sum(p.numel() for p in proposals.parameters())
    assert total - 300 * 260 == 3_403_596


# Temperature


def test_temperature_falls_linearly_and_stays_at_its_end():
    schedule = TemperatureSchedule(30.0, 1.0, 100)
    steps = torch.tensor([0, 50, 100, 1000])
    assert [schedule.at(s).item() for s in steps] == pytest.approx([30.0, 15.5, 1.0, 1.0])
    assert TemperatureSchedule(30.0, 1.0, 0).at(steps[0]).item() == 1.0


def test_every_iteration_counts_and_evaluation_uses_the_end():
    model = source(temperature=TemperatureSchedule(30.0, 1.0, 10))
    for expected in (30.0, 27.1, 24.2):
        assert model.current_temperature().item() == pytest.approx(expected)
        model(pyramid(), sizes())
        model.end_iteration()
    model.eval()
    assert model.current_temperature().item() == pytest.approx(1.0)
    assert model.step == 3


def test_only_whole_batches_of_a_training_are_steps_of_the_temperature():
    model = build_model(dpg())
    inputs = batch(SIZES, [2, 1])
    model(inputs, ends_iteration=False)
    with torch.no_grad():  # norms are being estimated
        model(inputs)
    model.eval()
    model(inputs)
    assert model.proposals.step == 0
    model.train()
    model(inputs)
    assert model.proposals.step == 1


@pytest.mark.parametrize(("key", "expected"), [(None, 250), (7, 7), (0, 0)])
def test_annealing_takes_its_part_of_the_schedule_unless_told_otherwise(key, expected):
    cfg = dpg("SOLVER.MAX_ITER", 900, "MODEL.SparseRCNN.DPG.TAU_ITERS", key)
    assert build_model(cfg).proposals.temperature.iterations == expected


def test_a_resumed_model_has_the_temperature_it_had():
    first, second = (build_model(dpg("MODEL.SparseRCNN.DPG.TAU_ITERS", 10)) for _ in range(2))
    for _ in range(3):
        first(batch(SIZES, [2, 1]))
    second.load_state_dict(first.state_dict())
    assert first.proposals.step == second.proposals.step == 3
    now = first.proposals.current_temperature()
    assert second.proposals.current_temperature() == now
    assert now.item() == pytest.approx(30 - 26 * 0.3)


# Statistics


def test_statistics_know_a_choice_from_a_mixture_and_an_image_from_another():
    equal = torch.full((3, 4, 6), 0.25)
    choice = torch.zeros(3, 4, 6)
    choice[:, [0, 1, 2, 3, 0, 1], range(6)] = 1  # another expert for every proposal, always it
    each = torch.zeros(2, 4, 6)
    each[0, 0], each[1, 3] = 1, 1
    for weights, entropy, variation, dead in (
        (equal, 1, 0, 0),
        (choice, 0, 0, 0.75),
        (each, 0, 1, 0.5),
        (torch.cat([equal[:1], choice[:1]]), 0.5, 0.75, 0),
    ):
        found = {k: v.item() for k, v in mixing_statistics(weights).items()}
        expected = {"entropy": entropy, "variation": variation, "dead": dead}
        assert found == pytest.approx(expected, abs=1e-6)
    assert "variation" not in mixing_statistics(equal[:1])  # nothing to compare with


def mixture_after_training(logit_norm, steps=200, images=4):
    """Statistics in evaluation, after learning features that are the same for all images."""
    torch.manual_seed(0)
    cfg = tiny_cfg(
        *("MODEL.SparseRCNN.DPG.ENABLED", True, "MODEL.SparseRCNN.NUM_PROPOSALS", 20),
        *("MODEL.SparseRCNN.DPG.LOGIT_NORM", logit_norm, "MODEL.SparseRCNN.DPG.TAU_ITERS", 0),
        *("MODEL.SparseRCNN.DPG.TAU_END", 1.0),
    )
    model = DynamicProposals(cfg)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    goal = torch.randn(1, 20, 32)
    for step in range(steps):
        features = [x.abs() for x in pyramid(images, channels=32, seed=step)]
        loss = (model(features, sizes(images)).features - goal).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    weights = model.weights(pyramid(16, channels=32, seed=-1), sizes(16))
    return {k: v.item() for k, v in mixing_statistics(weights).items()}


def test_what_all_images_have_in_common_does_not_make_the_choice():
    collapsed, alive = (mixture_after_training(logit_norm) for logit_norm in (False, True))
    assert collapsed["variation"] < 0.05
    assert alive["variation"] > 0.2
    assert alive["dead"] == 0


def test_every_logit_has_mean_0_and_variance_1_over_the_images_of_a_batch():
    model = source(logit_norm=True)
    logits = model.logits(pyramid(8), sizes(8)).flatten(1)
    torch.testing.assert_close(logits.mean(dim=0), torch.zeros(24), atol=1e-5, rtol=0)
    torch.testing.assert_close(logits.var(dim=0, correction=0), torch.ones(24), atol=0.05, rtol=0)


def test_a_batch_of_one_image_is_compared_with_the_images_before():
    model = source(logit_norm=True)
    for seed in range(40):
        model.logits(pyramid(4, seed=seed), sizes(4))
    one = pyramid(1, seed=99)
    expected = copy.deepcopy(model).eval().logits(one, sizes(1))
    found = model.logits(one, sizes(1))
    torch.testing.assert_close(found, expected)
    assert found.abs().max() > 0.1


def test_the_default_mixture_neither_decides_nor_forgets_the_image_within_a_few_steps():
    """Without standardizing, forty steps make it one-hot and the same for all images."""
    results = {}
    for standardize in (True, False):
        cfg = tiny_cfg(
            *("MODEL.SparseRCNN.DPG.ENABLED", True, "MODEL.SparseRCNN.NUM_PROPOSALS", 20),
            *("MODEL.SparseRCNN.DPG.STANDARDIZE", standardize, "SOLVER.MAX_ITER", 600),
            *("MODEL.SparseRCNN.DPG.LOGIT_NORM", False),
        )
        model = DynamicProposals(cfg)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
        goal = torch.randn(1, 20, 32)
        features = [20 * x.abs() for x in pyramid(channels=32)]  # sums of about a thousand
        for _ in range(40):
            loss = (model(features, sizes()).features - goal).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        statistics = mixing_statistics(model.weights(features, sizes()))
        results[standardize] = {k: v.item() for k, v in statistics.items()}
    assert results[True]["entropy"] > 0.5
    assert results[True]["variation"] > 0.005
    assert results[True]["dead"] == 0
    assert results[False]["entropy"] < 0.05
    assert results[False]["variation"] < 0.001
    assert results[False]["dead"] > 0.5


def test_the_training_log_tells_temperature_and_mixture():
    model = build_model(dpg("MODEL.SparseRCNN.DPG.LOG_PERIOD", 20))
    for iteration, names in ((18, set()), (19, {"tau", "entropy", "variation", "dead"})):
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
    again = build_model(dpg("MODEL.SparseRCNN.DPG.TILING_NOISE", 0.1))
    torch.manual_seed(7)  # another process has another seed, but needs the same experts
    again.load_state_dict(static.state_dict(), strict=False)
    assert torch.equal(again.proposals.expert_features, noisy.proposals.expert_features)
    deviation = noisy.proposals.expert_features - static.proposals.init_proposal_features.weight
    assert deviation.std().item() == pytest.approx(0.1, rel=0.1)
    assert torch.equal(noisy.proposals.expert_boxes[0], static.proposals.init_proposal_boxes.weight)


def test_a_static_checkpoint_with_another_number_of_proposals_is_not_tiled():
    static = build_model(tiny_cfg("MODEL.SparseRCNN.NUM_PROPOSALS", 5))
    report = build_model(dpg()).load_state_dict(static.state_dict(), strict=False)
    assert "init_proposal_boxes.weight" in report.unexpected_keys
    assert "proposal_generator.expert_boxes" in report.missing_keys


def test_one_expert_is_the_static_model_and_its_network_learns_nothing():
    model, static = build_model(dpg("MODEL.SparseRCNN.DPG.NUM_EXPERTS", 1)), build_model(tiny_cfg())
    model.load_state_dict(static.state_dict(), strict=False)
    inputs = batch(SIZES, [0, 0])
    with torch.no_grad():
        for a, b in zip(static.predict(inputs)[0], model.predict(inputs)[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
    sum(model(batch(SIZES, [2, 1])).values()).backward()
    for parameter in (model.proposals.fc1.weight, model.proposals.fc2.weight):
        assert parameter.grad.abs().max() == 0
    assert model.proposals.expert_features.grad.abs().max() > 0


def test_losses_reach_experts_and_network():
    model = build_model(dpg())
    sum(model(batch(SIZES, [2, 1])).values()).backward()
    for name, parameter in model.proposals.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def distance_from_alone(shapes, *, valid_region):
    """Total variation between the weights of the first image in a batch and alone."""
    options = ["MODEL.SparseRCNN.DPG.VALID_REGION", valid_region]
    options += ["MODEL.SparseRCNN.DPG.TAU_END", 1.0]
    torch.manual_seed(0)
    model = build_model(dpg(*options)).eval()
    model.proposals.fc2.weight.data.mul_(30)
    inputs = batch(shapes, [0, 0])
    with torch.no_grad():
        together, alone = (
            model.proposals.weights(*model.extract(x)[:2]) for x in (inputs, inputs[:1])
        )
    return (together[0] - alone[0]).abs().sum(dim=0).mean().item() / 2


@pytest.mark.parametrize("shapes", [[(64, 64), (128, 160)], [(192, 224), (192, 320)]])
def test_with_the_valid_region_neighbours_matter_through_the_border_of_the_backbone_only(shapes):
    whole = distance_from_alone(shapes, valid_region=False)
    assert whole > 0.1
    assert distance_from_alone(shapes, valid_region=True) < 0.2 * whole


@pytest.mark.parametrize("valid_region", [True, False])
def test_images_of_equal_padded_size_have_the_same_proposals_alone_and_in_a_batch(valid_region):
    assert distance_from_alone([(64, 90), (60, 96)], valid_region=valid_region) < 1e-5


def test_other_levels_have_their_strides():
    levels = ["MODEL.ROI_HEADS.IN_FEATURES", ["p3", "p4", "p5"]]
    model = build_model(dpg(*levels, "MODEL.SparseRCNN.DPG.VALID_REGION", True))
    assert model.proposals.strides == [8, 16, 32]
    assert all(torch.isfinite(v) for v in model(batch(SIZES, [2, 1])).values())


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


@pytest.mark.parametrize("enabled", [True, False])
def test_the_config_chooses_where_boxes_start(enabled):
    cfg = tiny_cfg(
        "MODEL.SparseRCNN.DPG.ENABLED", enabled, "MODEL.SparseRCNN.PROPOSALS.BOXES", "grid"
    )
    boxes = build_model(cfg).proposals(pyramid(channels=32), sizes()).boxes
    assert (boxes[0, :, 2] - boxes[0, :, 0]).max() < 96 / 2
