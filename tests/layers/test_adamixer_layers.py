"""Attention and mixing of AdaMixer against formulas and published numbers."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dsrcnn.layers.adaptive_mixing import AdaptiveMixing
from dsrcnn.layers.relation_attention import (
    RelationAttention,
    encode_positions,
    intersections_over_foreground,
)


def test_published_encodings():
    encoding = encode_positions(torch.tensor([100.0, 50, 3, 0.5]), 256)
    expected = {0: 0.099833, 1: 0.995004, 2: 0.074919, 3: 0.997190, 64: 0.049979, 65: 0.998750}
    expected |= {128: 0.141120, 129: -0.989992, 192: 0.479426, 193: 0.877583}
    assert encoding[list(expected)].tolist() == pytest.approx(list(expected.values()), abs=2e-6)
    assert encoding.sum().item() == pytest.approx(130.2739, abs=1e-3)


def test_overlaps_are_relative_to_the_first_box():
    boxes = torch.tensor([[0.0, 0, 10, 10], [5, 0, 15, 20], [100, 100, 101, 101], [3, 3, 3, 3]])
    overlaps = intersections_over_foreground(boxes)
    assert overlaps[:3, :3].tolist() == [[1, 0.5, 0], [pytest.approx(50 / 200), 1, 0], [0, 0, 1]]
    assert torch.isfinite(overlaps).all()


def test_attention_equals_its_formula():
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


def test_masked_proposals_are_ignored():
    torch.manual_seed(0)
    module = RelationAttention(16, 2).eval()
    features, xyzr, boxes = torch.randn(2, 4, 16), torch.rand(2, 4, 4), torch.rand(2, 4, 4) + 1
    boxes[..., 2:] += boxes[..., :2]
    mask = torch.tensor([[True, True, True, False], [True] * 4])
    masked = module(features, xyzr, boxes, mask)
    shorter = module(features[:1, :3], xyzr[:1, :3], boxes[:1, :3])
    torch.testing.assert_close(masked[:1, :3], shorter)


def test_mixing_equals_its_formula():
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
