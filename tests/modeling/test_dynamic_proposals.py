"""Initial boxes; DPG: mixture of experts, its network, temperature and statistics."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_cfg
from detectors import DPG, enable, options, pyramid, sizes, source, weights_of

from dsrcnn.config import read_cfg
from dsrcnn.errors import ConfigError
from dsrcnn.modeling.proposals import DynamicProposals, TemperatureSchedule
from dsrcnn.modeling.proposals.dynamic import mixing_statistics
from dsrcnn.modeling.proposals.learned import initial_boxes
from dsrcnn.modeling.proposals.staircase import StairStep, fuse_levels, resize_nearest


@pytest.mark.parametrize("tau", [1e-8, 0.01, 1.0, 30.0, 1e8])
def test_weights_are_equal_at_high_temperature_and_select_an_expert_at_low(tau):
    model = source(temperature=TemperatureSchedule(tau, tau, 0))
    weights = weights_of(model, pyramid(), sizes())
    assert weights.shape == (2, 4, 6)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(2, 6))
    if tau == 1e8:
        torch.testing.assert_close(weights, torch.full((2, 4, 6), 0.25))
    if tau == 1e-8:
        best = model.logits(pyramid(), sizes()).argmax(dim=1)
        torch.testing.assert_close(weights, F.one_hot(best, 4).mT.float())


def test_the_same_weights_mix_boxes_and_features():
    model = source(box_jitter=0.1).eval()
    weights = weights_of(model, pyramid(), sizes())
    boxes, features = model(pyramid(), sizes())
    for b, p in ((0, 0), (1, 5)):
        mixed = sum(weights[b, e, p] * model.expert_features[e, p] for e in range(4))
        torch.testing.assert_close(features[b, p], mixed)
        cx, cy, w, h = sum(weights[b, e, p] * model.expert_boxes[e, p] for e in range(4))
        expected = torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]) * sizes()[0]
        torch.testing.assert_close(boxes[b, p], expected)


@pytest.mark.parametrize("boxes", ["image", "center", "grid", "random"])
def test_jitter_keeps_box_sizes_positive(boxes):
    model = source(box_jitter=0.5, boxes=boxes, num_proposals=300)
    assert (model.expert_boxes[..., 2:] > 0).all()
    assert model.expert_boxes.std(dim=0).max() > 0


def test_proposals_differ_from_each_other_and_between_images():
    """The failure of the public attempt: experts shared by all proposals, at most four of them."""
    features = source(num_proposals=40)(pyramid(), sizes()).features
    distances = torch.cdist(features[0], features[0]) + 1e3 * torch.eye(40)
    assert distances.min() > 0.1
    assert not torch.allclose(features[0], features[1])


def test_without_standardization_only_the_temperature_keeps_initial_weights_from_selecting():
    """The paper's sum over a thousand channels; the public attempt has no temperature."""
    opts = enable("DPG", "STANDARDIZE", False, "LOGIT_NORM", False)
    model = DynamicProposals(read_cfg("coco/sparse_rcnn_R50_300pro_3x", opts))
    features = [0.5 * x for x in pyramid(height=256, width=320, channels=256)]
    entropies = []
    for temperature in (model.temperature, TemperatureSchedule(1.0, 1.0, 0)):
        model.temperature = temperature
        weights = weights_of(model, features, sizes(height=256, width=320))
        entropies.append(mixing_statistics(weights)["entropy"].item())
    assert entropies[0] > 0.3 > entropies[1]


def test_staircase_halves_and_concatenates_the_levels():
    steps = torch.nn.ModuleList(StairStep(8 * i, "none") for i in (1, 2, 3))
    features = pyramid(1, 800, 1344)
    assert [f.shape[2:] for f in features] == [(200, 336), (100, 168), (50, 84), (25, 42)]
    fused = fuse_levels(features, steps)
    assert fused.shape == (1, 32, 25, 42)
    x = features[0][:, :0]
    for step, level in zip(steps, features, strict=False):
        x = F.relu(step.conv(torch.cat([x, level], dim=1)))
    torch.testing.assert_close(fused, torch.cat([x, features[3]], dim=1))


@pytest.mark.parametrize("staircase", [True, False])
def test_network_follows_the_paper(staircase):
    """Staircase, resize to a square, sum over channels, two linear layers; in this order."""
    model, features = source(resize=30, staircase=staircase), pyramid()
    levels = [fuse_levels(features, model.stair)] if staircase else features
    square = torch.cat([F.interpolate(x, size=(30, 30)) for x in levels], dim=1)
    x = square.sum(dim=1).flatten(1)
    x = (x - x.mean(dim=1, keepdim=True)) / x.std(dim=1, keepdim=True, correction=0)
    expected = model.fc2(F.relu(model.fc1(x))).view(2, 4, 6)
    torch.testing.assert_close(model.logits(features, sizes()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("extent", [(1, 1), (7, 11), (30, 30), (25, 42), (100, 64)])
def test_resizing_is_nearest_neighbor(extent):
    maps = torch.randn(2, *extent)
    expected = F.interpolate(maps.double().unsqueeze(1), size=(30, 30)).squeeze(1).float()
    # Torch rounds a float where `resize_nearest` divides integers.
    assert (resize_nearest(maps, 30) == expected).float().mean() > 0.93


def test_resizing_the_valid_region_agrees_with_resizing_it_alone():
    maps, valid = torch.randn(2, 9, 12), torch.tensor([[9, 7], [4, 12]])
    resized = resize_nearest(maps, 30, valid)
    assert torch.equal(resized[0], resize_nearest(maps[:1, :9, :7], 30)[0])
    assert torch.equal(resized[1], resize_nearest(maps[1:, :4, :12], 30)[0])


@pytest.mark.parametrize("staircase", [True, False])
def test_valid_region_excludes_the_padding_of_the_batch(staircase):
    image = sizes(1, 60, 50)  # alone it is padded to 64 x 64
    alone = pyramid(1, 64, 64)
    padded = [F.pad(x, (0, x.shape[3], 0, x.shape[2] // 2), value=7.0) for x in alone]
    for valid_region in (True, False):
        model = source(staircase=staircase, valid_region=valid_region)
        for step in model.stair:  # 3x3 convolutions read the padding at the border of the image
            step.conv.weight.data *= F.pad(torch.ones(1, 1), (1, 1, 1, 1))
        logits = model.logits(alone, image)
        assert torch.allclose(model.logits(padded, image), logits, atol=1e-5) == valid_region


def test_parameter_counts_agree_with_the_published_ones():
    """What DPG adds to 300 proposals of R50."""
    proposals = DynamicProposals(read_cfg("coco/sparse_rcnn_R50_300pro_3x", enable("DPG")))
    parts = {n: sum(p.numel() for p in m.parameters()) for n, m in proposals.named_children()}
    assert parts == {"stair": 13_824 + 3_072, "fc1": 1_351_500, "fc2": 1_801_200, "logit_norm": 0}
    total = sum(p.numel() for p in proposals.parameters())
    assert total - 300 * 260 == 3_403_596


def test_temperature_falls_linearly_with_the_iterations_and_stays_at_its_end():
    schedule = TemperatureSchedule(30.0, 1.0, 100)
    steps = torch.tensor([0, 50, 100, 1000])
    assert schedule.at(steps).tolist() == pytest.approx([30.0, 15.5, 1.0, 1.0])
    assert TemperatureSchedule(30.0, 1.0, 0).at(steps).tolist() == [1.0] * 4
    model = source(temperature=TemperatureSchedule(30.0, 1.0, 10))
    for expected in (30.0, 27.1, 24.2):
        assert model.current_temperature().item() == pytest.approx(expected)
        model(pyramid(), sizes())
        model.end_iteration()
    assert model.eval().current_temperature().item() == pytest.approx(1.0)
    assert model.step == 3


@pytest.mark.parametrize(("value", "expected"), [(None, 250), (7, 7), (0, 0)])
def test_annealing_takes_10_36_of_the_schedule_unless_configured(value, expected):
    cfg = tiny_cfg(*DPG, *options("DPG.TAU_ITERS", value), "SOLVER.MAX_ITER", 900)
    assert DynamicProposals(cfg).temperature.iterations == expected


def test_statistics_distinguish_selection_from_mixture_and_images_from_each_other():
    equal = torch.full((3, 4, 6), 0.25)
    fixed = torch.zeros(3, 4, 6)
    fixed[:, [0, 1, 2, 3, 0, 1], range(6)] = 1  # one expert per proposal, the same on all images
    by_image = torch.zeros(2, 4, 6)
    by_image[0, 0], by_image[1, 3] = 1, 1
    for weights, entropy, variation, dead in (
        (equal, 1, 0, 0),
        (fixed, 0, 0, 0.75),
        (by_image, 0, 1, 0.5),
        (torch.cat([equal[:1], fixed[:1]]), 0.5, 0.75, 0),
    ):
        statistics = {k: v.item() for k, v in mixing_statistics(weights).items()}
        expected = {"entropy": entropy, "variation": variation, "dead": dead}
        assert statistics == pytest.approx(expected, abs=1e-6)
    assert "variation" not in mixing_statistics(equal[:1])  # nothing to compare with


def statistics_after_training(steps, features_of, *opts, test=None):
    """Statistics of the mixture after learning features that are the same for all images."""
    torch.manual_seed(0)
    model = DynamicProposals(tiny_cfg(*options("NUM_PROPOSALS", 20), *enable("DPG", *opts)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    goal = torch.randn(1, 20, 32)
    for step in range(steps):
        features = features_of(step)
        loss = (model(features, sizes(len(features[0]))).features - goal).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if test is not None:
        features = test
        model.eval()
    weights = weights_of(model, features, sizes(len(features[0])))
    return {k: v.item() for k, v in mixing_statistics(weights).items()}


def test_logit_norm_keeps_common_features_from_dominating_the_selection():
    features_of = lambda step: [x.abs() for x in pyramid(4, channels=32, seed=step)]  # noqa: E731
    settings = ("TAU_ITERS", 0, "TAU_END", 1.0, "HIDDEN", 200)
    test = pyramid(16, channels=32, seed=-1)
    collapsed, alive = (
        statistics_after_training(200, features_of, "LOGIT_NORM", norm, *settings, test=test)
        for norm in (False, True)
    )
    assert alive["variation"] > 0.2 > 0.05 > collapsed["variation"]
    assert alive["dead"] == 0


def test_without_standardization_forty_steps_select_one_expert_for_all_images():
    features = [20 * x.abs() for x in pyramid(channels=32)]  # sums of about a thousand
    settings = ("LOGIT_NORM", False, "TAU_ITERS", 167, "STANDARDIZE")
    alive, collapsed = (
        statistics_after_training(40, lambda _: features, *settings, x) for x in (True, False)
    )
    assert alive["entropy"] > 0.5 > 0.05 > collapsed["entropy"]
    assert alive["variation"] > 0.005 > 0.001 > collapsed["variation"]
    assert alive["dead"] == 0 < 0.5 < collapsed["dead"]


def test_logits_have_mean_0_and_variance_1_over_the_images_of_a_batch():
    logits = source(logit_norm=True).logits(pyramid(8), sizes(8)).flatten(1)
    torch.testing.assert_close(logits.mean(dim=0), torch.zeros(24), atol=1e-5, rtol=0)
    torch.testing.assert_close(logits.var(dim=0, correction=0), torch.ones(24), atol=0.05, rtol=0)


def test_logits_of_a_single_image_are_compared_with_earlier_images():
    model = source(logit_norm=True)
    for seed in range(40):
        model.logits(pyramid(4, seed=seed), sizes(4))
    inputs = pyramid(1, seed=99), sizes(1)
    expected = copy.deepcopy(model).eval().logits(*inputs)
    logits = model.logits(*inputs)
    torch.testing.assert_close(logits, expected)
    assert logits.abs().max() > 0.1


@pytest.mark.parametrize("count", [1, 5, 50, 300])
@pytest.mark.parametrize("mode", ["image", "center", "grid", "random"])
def test_initial_boxes_are_inside_of_the_image(mode, count):
    center, size = initial_boxes(mode, count).split(2, dim=1)
    assert len(center) == count
    assert (size > 0).all()
    assert (center - size / 2 >= -1e-6).all()
    assert (center + size / 2 <= 1 + 1e-6).all()


def test_cells_of_the_grid_cover_the_image_once():
    boxes = initial_boxes("grid", 9)
    assert boxes[:, 2:].prod(dim=1).sum().item() == pytest.approx(1)
    assert boxes[0].tolist() == pytest.approx([1 / 6, 1 / 6, 1 / 3, 1 / 3])
    assert boxes[5].tolist() == pytest.approx([5 / 6, 0.5, 1 / 3, 1 / 3])


def test_unknown_modes_are_refused():
    with pytest.raises(ConfigError, match="'corner'; write one of image, center, grid, random"):
        initial_boxes("corner", 3)
