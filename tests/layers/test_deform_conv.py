"""Deformable convolutions by torchvision: numbers by a loop, and inside Detectron2's ResNets."""

import pytest
import torch
from conftest import tiny_cfg
from detectron2.modeling import build_backbone
from torch.nn import functional as F

from dsrcnn.compat import has_compiled_extension
from dsrcnn.layers.deform_conv import DeformConv, ModulatedDeformConv


def sample(image, y, x):
    """Bilinear value of an image (C, H, W) at a point, zero outside."""
    total = torch.zeros(image.shape[0])
    for row in (int(y // 1), int(y // 1) + 1):
        for column in (int(x // 1), int(x // 1) + 1):
            if 0 <= row < image.shape[1] and 0 <= column < image.shape[2]:
                total += image[:, row, column] * (1 - abs(y - row)) * (1 - abs(x - column))
    return total


def by_loop(conv, image, offset, mask):
    """One image (C, H, W), a kernel of 3, stride 1, padding 1."""
    height, width = image.shape[1:]
    out = torch.zeros(conv.weight.shape[0], height, width)
    for i in range(height):
        for j in range(width):
            for k in range(9):
                dy, dx = offset[2 * k, i, j].item(), offset[2 * k + 1, i, j].item()
                value = sample(image, i - 1 + k // 3 + dy, j - 1 + k % 3 + dx)
                factor = 1.0 if mask is None else mask[k, i, j]
                out[:, i, j] += conv.weight[:, :, k // 3, k % 3] @ value * factor
    return out + (0 if conv.bias is None else conv.bias.view(-1, 1, 1))


@pytest.mark.parametrize("kind", [DeformConv, ModulatedDeformConv])
def test_it_is_the_loop(kind):
    conv = kind(2, 3, kernel_size=3, padding=1)
    assert (conv.bias is not None) == (kind is ModulatedDeformConv)
    x, offset = torch.randn(1, 2, 5, 6), 2 * torch.randn(1, 18, 5, 6)
    mask = torch.rand(1, 9, 5, 6) if kind is ModulatedDeformConv else None
    with torch.no_grad():
        found = conv(x, offset, mask)[0] if mask is not None else conv(x, offset)[0]
        expected = by_loop(conv, x[0], offset[0], None if mask is None else mask[0])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_without_offsets_it_is_a_convolution():
    conv = DeformConv(2, 3, kernel_size=3, stride=2, padding=2, dilation=2, bias=False)
    x = torch.randn(2, 2, 9, 9)
    expected = F.conv2d(x, conv.weight, None, 2, 2, 2)
    offset = torch.zeros(2, 18, *expected.shape[2:])
    torch.testing.assert_close(conv(x, offset), expected)


@pytest.mark.skipif(has_compiled_extension(), reason="Detectron2 has its own")
@pytest.mark.parametrize("modulated", [False, True])
def test_a_resnet_of_detectron2_trains_with_it(modulated):
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
