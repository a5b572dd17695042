"""Sampling at points: deformable convolutions, and AdaMixer's sampling of a pyramid."""

import math

import pytest
import torch
from conftest import tiny_cfg
from detectron2.modeling import build_backbone
from torch.nn import functional as F

from dsrcnn.compat import has_compiled_extension
from dsrcnn.layers.deform_conv import DeformConv, ModulatedDeformConv
from dsrcnn.layers.point_sampling import GroupedPyramid, sample_points


def bilinear(image, y, x):
    """Bilinear value of an image (C, H, W) at a point, zero outside."""
    total = torch.zeros(len(image), dtype=image.dtype)
    for row in (int(y // 1), int(y // 1) + 1):
        for column in (int(x // 1), int(x // 1) + 1):
            if 0 <= row < image.shape[1] and 0 <= column < image.shape[2]:
                total += image[:, row, column] * (1 - abs(y - row)) * (1 - abs(x - column))
    return total


def convolved_by_loop(conv, image, offset, mask):
    """One image (C, H, W), a kernel of 3, stride 1, padding 1."""
    height, width = image.shape[1:]
    out = torch.zeros(conv.weight.shape[0], height, width)
    for i in range(height):
        for j in range(width):
            for k in range(9):
                dy, dx = offset[2 * k, i, j].item(), offset[2 * k + 1, i, j].item()
                value = bilinear(image, i - 1 + k // 3 + dy, j - 1 + k % 3 + dx)
                factor = 1.0 if mask is None else mask[k, i, j]
                out[:, i, j] += conv.weight[:, :, k // 3, k % 3] @ value * factor
    return out + (0 if conv.bias is None else conv.bias.view(-1, 1, 1))


@pytest.mark.parametrize("kind", [DeformConv, ModulatedDeformConv])
def test_deformable_convolutions_equal_a_loop(kind):
    conv = kind(2, 3, kernel_size=3, padding=1)
    assert (conv.bias is not None) == (kind is ModulatedDeformConv)
    x, offset = torch.randn(1, 2, 5, 6), 2 * torch.randn(1, 18, 5, 6)
    mask = torch.rand(1, 9, 5, 6) if kind is ModulatedDeformConv else None
    with torch.no_grad():
        expected = convolved_by_loop(conv, x[0], offset[0], None if mask is None else mask[0])
        torch.testing.assert_close(conv(x, offset, mask)[0], expected, rtol=1e-4, atol=1e-5)


def test_without_offsets_they_equal_a_convolution():
    conv = DeformConv(2, 3, kernel_size=3, stride=2, padding=2, dilation=2, bias=False)
    x = torch.randn(2, 2, 9, 9)
    expected = F.conv2d(x, conv.weight, None, 2, 2, 2)
    offset = torch.zeros(2, 18, *expected.shape[2:])
    torch.testing.assert_close(conv(x, offset), expected)


@pytest.mark.skipif(has_compiled_extension(), reason="Detectron2 has compiled ones")
@pytest.mark.parametrize("modulated", [False, True])
def test_detectron2s_resnets_train_with_them(modulated):
    options = ["MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.RES2_OUT_CHANNELS", 16]
    options += ["MODEL.RESNETS.WIDTH_PER_GROUP", 8, "MODEL.RESNETS.STEM_OUT_CHANNELS", 8]
    options += ["MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, True, True, True]]
    cfg = tiny_cfg(*options, "MODEL.RESNETS.DEFORM_MODULATED", modulated)
    backbone = build_backbone(cfg)
    kinds = {type(m) for m in backbone.modules()}
    assert (ModulatedDeformConv if modulated else DeformConv) in kinds
    sum(level.sum() for level in backbone(torch.randn(1, 3, 64, 64)).values()).backward()
    offsets = [p for n, p in backbone.named_parameters() if "conv2_offset" in n]
    assert offsets
    assert all(p.grad is not None for p in offsets)


def sampled_by_loop(levels, strides, points, groups):
    """Sample one value after the other: (B, N, G, P, D / G)."""
    batch, count, _, number = points.shape[:4]
    width = levels[0].shape[1] // groups
    out = torch.zeros(batch, count, groups, number, width, dtype=points.dtype)
    for b in range(batch):
        for n in range(count):
            for g in range(groups):
                for p in range(number):
                    x, y, z = points[b, n, g, p].tolist()
                    weights = torch.tensor([-0.5 * (z - math.log2(s)) ** 2 for s in strides])
                    for w, level, s in zip(weights.softmax(0), levels, strides, strict=True):
                        part = level[b, g * width : (g + 1) * width]
                        out[b, n, g, p] += w * bilinear(part, y / s - 0.5, x / s - 0.5)
    return out


def test_sampling_equals_a_loop():
    torch.manual_seed(0)
    levels = [torch.randn(2, 4, 24 // 2**i, 32 // 2**i).double() for i in range(3)]
    place = torch.rand(2, 3, 2, 5, 2).double() * 160 - 20  # some outside of 128 x 96
    points = torch.cat([place, torch.rand(2, 3, 2, 5, 1).double() * 6], dim=-1)
    pyramid = GroupedPyramid.from_levels(levels, (4, 8, 16), 2)
    expected = sampled_by_loop(levels, (4, 8, 16), points, 2)
    torch.testing.assert_close(sample_points(pyramid, points), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("scale", "expected"), [
    (2.0, [0.570459, 0.346001, 0.077203, 0.006337]),
    (3.5, [0.134471, 0.365529, 0.365529, 0.134471]),
    (1.0, [0.805154, 0.179654, 0.014747, 0.000445]),
])  # fmt: skip
def test_published_level_weights(scale, expected):
    points = torch.tensor([64.0, 64.0, scale]).view(1, 1, 1, 1, 3)
    for index, weight in enumerate(expected):
        levels = [torch.full((1, 1, 32, 32), float(i == index)) for i in range(4)]
        pyramid = GroupedPyramid.from_levels(levels, (4, 8, 16, 32), 1)
        assert sample_points(pyramid, points).item() == pytest.approx(weight, abs=1e-5)


def test_gradients_reach_features_positions_and_scales():
    levels = [torch.randn(1, 2, 6 // 2**i, 6 // 2**i).double().requires_grad_() for i in range(2)]
    points = (torch.rand(1, 2, 1, 2, 3).double() * 15 + 3).requires_grad_()

    def sample(points, *levels):
        return sample_points(GroupedPyramid.from_levels(levels, (4, 8), 1), points)

    assert torch.autograd.gradcheck(sample, (points, *levels))
