"""The layers of AdaMixer against loops and numbers by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dsrcnn.layers.adaptive_mixing import AdaptiveMixing
from dsrcnn.layers.point_sampling import GroupedPyramid, sample_points
from dsrcnn.layers.relation_attention import (
    RelationAttention,
    encode_positions,
    intersections_over_foreground,
)


def test_positions_are_encoded_by_waves():
    found = encode_positions(torch.tensor([500.0, 250.0, 3.0, -1.0]), 16)
    expected = []
    for value in (0.5, 0.25, 3.0, -1.0):
        for wavelength in (1.0, 10_000.0**0.5):
            expected += [math.sin(value / wavelength), math.cos(value / wavelength)]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)


def test_published_waves():
    found = encode_positions(torch.tensor([100.0, 50, 3, 0.5]), 256)
    expected = {0: 0.099833, 1: 0.995004, 2: 0.074919, 3: 0.997190, 64: 0.049979, 65: 0.998750}
    expected |= {128: 0.141120, 129: -0.989992, 192: 0.479426, 193: 0.877583}
    assert found[list(expected)].tolist() == pytest.approx(list(expected.values()), abs=2e-6)
    assert found.sum().item() == pytest.approx(130.2739, abs=1e-3)


def test_published_logarithms_of_overlaps():
    boxes = torch.tensor([[0.0, 0, 10, 10], [5, 5, 10, 15], [50, 50, 60, 60]])
    found = torch.log(intersections_over_foreground(boxes) + 1e-7)
    pairs = [found[0, 1].item(), found[1, 0].item(), found[0, 2].item()]
    assert pairs == pytest.approx([-1.386294, -0.693147, -16.118095], abs=2e-6)


def test_intersections_over_foreground():
    boxes = torch.tensor([[0.0, 0, 10, 10], [5, 0, 15, 20], [100, 100, 101, 101], [3, 3, 3, 3]])
    found = intersections_over_foreground(boxes)
    assert found[:3, :3].tolist() == [[1, 0.5, 0], [pytest.approx(50 / 200), 1, 0], [0, 0, 1]]
    assert torch.isfinite(found).all()


def test_attention_is_that_of_the_formula():
    torch.manual_seed(0)
    module = RelationAttention(16, 2).double().eval()
    features, xyzr = torch.randn(1, 3, 16).double(), torch.rand(1, 3, 4).double()
    boxes = torch.tensor([[[0.0, 0, 10, 10], [5, 0, 15, 20], [8, 8, 20, 20]]]).double()
    x = (features + encode_positions(xyzr, 16))[0]
    weight, bias = module.attention.in_proj_weight, module.attention.in_proj_bias
    q, k, v = (F.linear(x, w, b) for w, b in zip(weight.chunk(3), bias.chunk(3), strict=True))
    overlaps = torch.log(intersections_over_foreground(boxes[0]) + 1e-7)
    heads = []
    for head in range(2):
        part = slice(8 * head, 8 * head + 8)
        scores = q[:, part] @ k[:, part].T / math.sqrt(8) + module.iof_tau[head] * overlaps
        heads.append(scores.softmax(dim=-1) @ v[:, part])
    expected = module.norm(x + module.attention.out_proj(torch.cat(heads, dim=-1)))
    torch.testing.assert_close(module(features, xyzr, boxes)[0], expected)


def test_masked_proposals_are_not_attended_to():
    torch.manual_seed(0)
    module = RelationAttention(16, 2).eval()
    features, xyzr, boxes = torch.randn(2, 4, 16), torch.rand(2, 4, 4), torch.rand(2, 4, 4) + 1
    boxes[..., 2:] += boxes[..., :2]
    mask = torch.tensor([[True, True, True, False], [True] * 4])
    found = module(features, xyzr, boxes, mask)
    shorter = module(features[:1, :3], xyzr[:1, :3], boxes[:1, :3])
    torch.testing.assert_close(found[:1, :3], shorter)


def by_loop(levels, strides, points, groups):
    """One value after the other: (B, N, G, P, D / G)."""
    batch, count, _, each = points.shape[:4]
    width = levels[0].shape[1] // groups
    out = torch.zeros(batch, count, groups, each, width, dtype=points.dtype)
    for b in range(batch):
        for n in range(count):
            for g in range(groups):
                for p in range(each):
                    x, y, z = points[b, n, g, p].tolist()
                    weights = torch.tensor([-0.5 * (z - math.log2(s)) ** 2 for s in strides])
                    for w, level, s in zip(weights.softmax(0), levels, strides, strict=True):
                        part = level[b, g * width : (g + 1) * width]
                        out[b, n, g, p] += w * bilinear(part, y / s - 0.5, x / s - 0.5)
    return out


def bilinear(image, y, x):
    total = torch.zeros(len(image), dtype=image.dtype)
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < image.shape[1] and 0 <= column < image.shape[2]:
                total += image[:, row, column] * (1 - abs(y - row)) * (1 - abs(x - column))
    return total


def test_sampling_is_the_loop():
    torch.manual_seed(0)
    levels = [torch.randn(2, 4, 24 // 2**i, 32 // 2**i).double() for i in range(3)]
    place = torch.rand(2, 3, 2, 5, 2).double() * 160 - 20  # some outside of 128 x 96
    points = torch.cat([place, torch.rand(2, 3, 2, 5, 1).double() * 6], dim=-1)
    pyramid = GroupedPyramid.from_levels(levels, (4, 8, 16), 2)
    found = sample_points(pyramid, points)
    torch.testing.assert_close(found, by_loop(levels, (4, 8, 16), points, 2), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        (2.0, [0.570459, 0.346001, 0.077203, 0.006337]),
        (3.5, [0.134471, 0.365529, 0.365529, 0.134471]),
        (1.0, [0.805154, 0.179654, 0.014747, 0.000445]),
    ],
)
def test_published_level_weights(scale, expected):
    strides = (4, 8, 16, 32)
    for index, weight in enumerate(expected):
        levels = [torch.full((1, 1, 4, 4), float(i == index)) for i in range(4)]
        points = torch.tensor([8.0, 8.0, scale]).view(1, 1, 1, 1, 3)
        # Where a level is larger than a cell around the point, its value is 1.
        levels = [level.repeat(1, 1, 8, 8) for level in levels]
        points[..., :2] = 64.0
        found = sample_points(GroupedPyramid.from_levels(levels, strides, 1), points)
        assert found.item() == pytest.approx(weight, abs=1e-5)


def test_gradients_reach_features_places_and_scales():
    levels = [torch.randn(1, 2, 6 // 2**i, 6 // 2**i).double().requires_grad_() for i in range(2)]
    points = (torch.rand(1, 2, 1, 2, 3).double() * 15 + 3).requires_grad_()

    def sample(points, *levels):
        return sample_points(GroupedPyramid.from_levels(levels, (4, 8), 1), points)

    assert torch.autograd.gradcheck(sample, (points, *levels))


def test_mixing_is_that_of_the_formula():
    torch.manual_seed(0)
    module = AdaptiveMixing(8, 2, 3, 5, nn.ReLU()).double()
    sampled, features = torch.randn(4, 2, 3, 4).double(), torch.randn(4, 8).double()
    generated = module.parameter_generator(features).view(4, 2, 16 + 15)
    out = []
    for row in range(4):
        parts = []
        for group in range(2):
            channels = generated[row, group, :16].view(4, 4)
            points = generated[row, group, 16:].view(5, 3)
            x = F.layer_norm(sampled[row, group] @ channels, (3, 4)).relu()
            parts.append(F.layer_norm(points @ x, (5, 4)).relu().flatten())
        out.append(features[row] + module.out_proj(torch.cat(parts)))
    torch.testing.assert_close(module(sampled, features), torch.stack(out))
