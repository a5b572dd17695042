"""DPG: the mixture of experts, and the network that weighs them."""

import pytest
import torch
import torch.nn.functional as F
from conftest import batch
from detectron2.modeling import build_model
from dpg_scenes import DPG, SIZES, _same_start, dpg, pyramid, sizes, source  # noqa: F401  (a fixture)

from dsrcnn.config import read_cfg
from dsrcnn.modeling.proposals import DynamicProposals, TemperatureSchedule
from dsrcnn.modeling.proposals.staircase import StairStep, climb, resize_nearest


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
