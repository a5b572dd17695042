"""Initial boxes; DPG: mixture of experts, its network, temperature and statistics."""

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_cfg
from detectors import DPG, enable, options, pyramid, sizes, source, weights_of

from dsrcnn.config import read_cfg
from dsrcnn.errors import ConfigError
from dsrcnn.modeling.proposals import DynamicProposals, TemperatureSchedule
from dsrcnn.modeling.proposals.dynamic import ScaledLinear, mixture_statistics
from dsrcnn.modeling.proposals.learned import initial_boxes
from dsrcnn.modeling.proposals.staircase import StairStep, fuse_levels, resize_nearest


@pytest.mark.parametrize("tau", [1e-8, 0.01, 1.0, 30.0, 1e8])
def test_weights_are_equal_at_high_temperature_and_select_an_expert_at_low(tau):
    model = source(temperature=TemperatureSchedule(tau, tau, 0)).eval()
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
    # Statistics of the norms are 0 and 1 at the start.
    x = square.sum(dim=1).flatten(1)
    hidden = F.relu(F.linear(x, model.fc1.weight / 30, model.fc1.bias))
    expected = F.linear(hidden, model.fc2.weight / 4, model.fc2.bias).view(2, 4, 6)
    torch.testing.assert_close(model.logits(features, sizes()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("extent", [(1, 1), (7, 11), (30, 30), (25, 42), (100, 64)])
def test_resizing_is_nearest_neighbor(extent):
    maps, whole = torch.randn(2, *extent), torch.tensor([extent, extent])
    expected = F.interpolate(maps.double().unsqueeze(1), size=(30, 30)).squeeze(1).float()
    # Torch rounds a float where `resize_nearest` divides integers.
    assert (resize_nearest(maps, 30, whole) == expected).float().mean() > 0.93


def test_resizing_the_valid_region_agrees_with_resizing_it_alone():
    maps, valid = torch.randn(2, 9, 12), torch.tensor([[9, 7], [4, 12]])
    resized = resize_nearest(maps, 30, valid)
    assert torch.equal(resized[0], resize_nearest(maps[:1, :9, :7], 30, valid[:1])[0])
    assert torch.equal(resized[1], resize_nearest(maps[1:, :4, :12], 30, valid[1:])[0])


@pytest.mark.parametrize("staircase", [True, False])
def test_valid_region_excludes_the_padding_of_the_batch(staircase):
    image = sizes(1, 60, 50)  # alone it is padded to 64 x 64
    alone = pyramid(1, 64, 64)
    padded = [F.pad(x, (0, x.shape[3], 0, x.shape[2] // 2), value=7.0) for x in alone]
    model = source(staircase=staircase)
    for step in model.stair:  # 3x3 convolutions read the padding at the border of the image
        step.conv.weight.data *= F.pad(torch.ones(1, 1), (1, 1, 1, 1))
    model.eval()
    expected = model.logits(alone, image)
    torch.testing.assert_close(model.logits(padded, image), expected, atol=1e-5, rtol=0)


def test_parameter_counts_agree_with_the_published_ones():
    """What DPG adds to 300 proposals of R50."""
    proposals = DynamicProposals(read_cfg("coco/sparse_rcnn_R50_300pro_3x", enable("DPG")))
    parts = {n: sum(p.numel() for p in m.parameters()) for n, m in proposals.named_children()}
    assert parts == {"stair": 13_824 + 3_072, "map_norm": 0, "fc1": 1_351_500,
                     "hidden_norm": 0, "fc2": 1_801_200}  # fmt: skip
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
        boxes = torch.zeros(len(weights), 6, 4)
        boxes[0] = 0.3
        statistics = {k: v.item() for k, v in mixture_statistics(weights, boxes).items()}
        deviation = 0.3 / len(weights) ** 0.5  # of one value that differs from the others
        expected = {"entropy": entropy, "variation": variation, "dead": dead}
        assert statistics == pytest.approx({**expected, "box_variation": deviation}, abs=1e-6)
    # A single image has nothing to compare with.
    assert set(mixture_statistics(equal[:1], boxes[:1])) == {"entropy", "dead"}


def statistics_after_training(goal_of, steps=150):
    """Statistics of mixtures for new images after learning features that `goal_of` images gives."""
    torch.manual_seed(0)
    opts = enable("DPG", "HIDDEN", 200)
    model = DynamicProposals(tiny_cfg(*options("NUM_PROPOSALS", 20), *opts))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        images = bright_images(step)
        loss = (model(images, sizes(4)).features - goal_of(images)).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    test = bright_images(-3)
    assert goal_by_side(test)[:, 0].unique(dim=0).shape[0] == 2  # both sides
    weights = weights_of(model, test, sizes(4))
    statistics = mixture_statistics(weights, model.mix(weights)[0])
    return {k: v.item() for k, v in statistics.items()}


def bright_images(seed):
    """Pyramids whose sums over channels are large everywhere and larger on the left or right."""
    features = [20 * x.abs() for x in pyramid(4, channels=32, seed=seed)]
    left = torch.rand(4, generator=torch.Generator().manual_seed(seed + 99)) > 0.5
    for x in features:
        half = x.shape[3] // 2
        x[left, :, :, :half] *= 2
        x[~left, :, :, half:] *= 2
    return features


GOALS = torch.randn(2, 20, 32, generator=torch.Generator().manual_seed(0))


def one_goal(images):
    return GOALS[0]


def goal_by_side(images):
    brightness = images[0].mean(dim=(1, 2)).unflatten(1, (2, -1)).mean(dim=2)
    return GOALS[brightness.argmax(dim=1)]


def test_mixtures_differ_where_images_need_different_proposals_and_no_expert_dies():
    """The same goal for all images is reached by the experts and the bias, not by the network."""
    same, different = map(statistics_after_training, (one_goal, goal_by_side))
    for statistics in (same, different):
        assert statistics["dead"] == 0
        assert statistics["entropy"] > 0.8
    assert different["variation"] > 3 * same["variation"]
    assert different["box_variation"] > 0.015 > 0.01 > same["box_variation"]


def test_untrained_mixtures_are_the_mean_of_the_experts_with_the_scale_of_static_features():
    model = DynamicProposals(read_cfg("coco/sparse_rcnn_R50_300pro_3x", enable("DPG")))
    boxes, features = model.mix(weights_of(model, pyramid(channels=256), sizes()))
    torch.testing.assert_close(features, model.expert_features.mean(dim=0).expand(2, -1, -1))
    assert features.std().item() == pytest.approx(1.0, abs=0.02)
    assert boxes.std(dim=1).max() > 0.05


def test_steps_of_the_optimizer_change_logits_alike_whatever_the_width():
    """A plain linear layer of ``n`` inputs would change by ``n`` times the learning rate."""
    changes = []
    for width in (100, 1600):
        torch.manual_seed(0)
        layer, x = ScaledLinear(width, 1), torch.randn(1, width)
        before = layer(x).detach()
        optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3, weight_decay=0)
        layer(x).sum().backward()
        optimizer.step()
        changes.append((before - layer(x)).item())
    assert changes[1] == pytest.approx(4 * changes[0], rel=0.2)  # the root of 16, not 16
    assert changes[1] == pytest.approx(1e-3 * 1600**0.5 * 0.8, rel=0.1)


def test_the_scaled_layer_starts_like_a_plain_one():
    torch.manual_seed(0)
    layer, x = ScaledLinear(900, 2000), torch.randn(50, 900)
    assert layer(x).std().item() == pytest.approx(3**-0.5, rel=0.05)  # of U(-1/30, 1/30)
    assert ScaledLinear(900, 7, zero=True)(x).abs().max() == 0


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
