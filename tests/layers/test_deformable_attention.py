"""Multi-scale deformable attention against loops, and the geometry of tokens."""

import math

import pytest
import torch
from torch import nn

from dsrcnn.layers.deformable_attention import (
    DeformableAttention,
    References,
    TokenPyramid,
    sample_levels,
)

SHAPES = [(6, 8), (3, 4), (2, 2)]
PADDED = (48, 64)


def levels(images=2, channels=8, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(images, channels, *s, generator=generator, dtype=dtype) for s in SHAPES]


def pyramid(sizes=((64, 48), (40, 30)), **options):
    """Images of (width, height), padded."""
    sizes = torch.tensor([[w, h, w, h] for w, h in sizes], dtype=torch.float32)
    return TokenPyramid.from_levels(levels(len(sizes), **options), sizes, PADDED)


def read(image, x, y):
    """Bilinear value of an image (d, H, W) at fractions of it, zero outside."""
    column, row = x * image.shape[2] - 0.5, y * image.shape[1] - 0.5
    total = torch.zeros(len(image), dtype=image.dtype)
    for i in (math.floor(row), math.floor(row) + 1):
        for j in (math.floor(column), math.floor(column) + 1):
            if 0 <= i < image.shape[1] and 0 <= j < image.shape[2]:
                total += image[:, i, j] * (1 - abs(row - i)) * (1 - abs(column - j))
    return total


def sampled_by_loop(values, locations, weights):
    images, queries, heads, _, points, _ = locations.shape
    result = torch.zeros(images, queries, heads, values.shape[-1], dtype=values.dtype)
    for b in range(images):
        for h in range(heads):
            first = 0
            for l, (height, width) in enumerate(SHAPES):  # noqa: E741
                tokens = values[b, first : first + height * width, h]
                image = tokens.T.reshape(-1, height, width)
                first += height * width
                for q in range(queries):
                    for k in range(points):
                        x, y = locations[b, q, h, l, k].tolist()
                        result[b, q, h] += weights[b, q, h, l, k] * read(image, x, y)
    return result.flatten(2)


def test_samples_of_all_levels_equal_a_loop():
    values = torch.randn(2, 6 * 8 + 3 * 4 + 2 * 2, 2, 4)
    locations, weights = torch.rand(2, 5, 2, 3, 2, 2) * 1.4 - 0.2, torch.rand(2, 5, 2, 3, 2)
    expected = sampled_by_loop(values, locations, weights)
    torch.testing.assert_close(
        sample_levels(values, SHAPES, locations, weights), expected, rtol=1e-4, atol=1e-5
    )


def test_gradients_of_samples_agree_with_finite_differences():
    values = torch.randn(1, 64, 1, 2, dtype=torch.float64, requires_grad=True)
    locations = torch.rand(1, 2, 1, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(1, 2, 1, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *x: sample_levels(x[0], SHAPES, *x[1:]), (values, locations, weights)
    )


def attention(points=2):
    layer = DeformableAttention(8, heads=2, levels=3, points=points)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


@torch.no_grad()
def test_attention_at_boxes_and_points_equals_a_loop():
    """Offsets are in halves of boxes over points, or in cells of the level; padding is zero."""
    layer, tokens = attention(), pyramid()
    boxes = torch.rand(2, 4, 4) * 0.6
    boxes[:, 2:, 2:] = 0  # points
    queries = torch.randn(2, 4, 8)
    result = layer(queries, References.at_boxes(boxes, tokens, 2), tokens)
    values = layer.value_proj(tokens.tokens) * ~tokens.is_padding.unsqueeze(-1)
    offsets = layer.sampling_offsets(queries).view(2, 4, 2, 3, 2, 2)
    weights = layer.attention_weights(queries).view(2, 4, 2, 6).softmax(dim=-1).view(2, 4, 2, 3, 2)
    locations = torch.zeros_like(offsets)
    for b in range(2):
        for q in range(4):
            for l, (height, width) in enumerate(SHAPES):  # noqa: E741
                center, size = boxes[b, q].split(2)
                unit = size / 4 * tokens.covered[b, l]
                if q >= 2:
                    unit = torch.tensor([1 / width, 1 / height])
                locations[b, q, :, l] = center * tokens.covered[b, l] + offsets[b, q, :, l] * unit
    sampled = sampled_by_loop(values.view(2, -1, 2, 4), locations, weights)
    torch.testing.assert_close(result, layer.output_proj(sampled), rtol=1e-4, atol=1e-5)


def test_places_and_padding_of_tokens_agree_with_a_mask_of_pixels():
    """As in the published code: the mask of pixels, resized to the level by nearest neighbors."""
    tokens = pyramid()
    mask = torch.zeros(2, 1, *PADDED)
    mask[0], mask[1, :, :30, :40] = 1, 1
    first = 0
    for index, shape in enumerate(SHAPES):
        resized = torch.nn.functional.interpolate(mask, size=shape)[:, 0].bool()
        span = slice(first, first + shape[0] * shape[1])
        first = span.stop
        assert torch.equal(~tokens.is_padding[:, span], resized.flatten(1))
        counts = torch.stack([resized[:, 0].sum(dim=1), resized[:, :, 0].sum(dim=1)], dim=1)
        covered = counts / torch.tensor([shape[1], shape[0]])
        torch.testing.assert_close(tokens.covered[:, index], covered)
        corner = tokens.places[:, span.start]
        torch.testing.assert_close(corner, 0.5 / counts)


@torch.no_grad()
def test_padding_is_not_seen():
    layer, tokens, queries = attention(), pyramid(), torch.randn(2, 4, 8)
    references = References.at_boxes(torch.rand(2, 4, 4), tokens, 2)
    noise = torch.where(tokens.is_padding.unsqueeze(-1), 100.0, 0.0)
    changed = tokens._replace(tokens=tokens.tokens + noise)
    assert torch.equal(layer(queries, references, changed), layer(queries, references, tokens))
    assert noise.any()


def test_untrained_heads_look_in_different_directions_with_equal_weights():
    layer = DeformableAttention(16, heads=8, levels=1, points=2)
    offsets = layer.sampling_offsets(torch.randn(16)).view(8, 2, 2)
    assert offsets[0].tolist() == [[1, 0], [2, 0]]
    torch.testing.assert_close(offsets[1], torch.tensor([[1.0, 1], [2, 2]]))
    assert offsets.abs().amax(dim=(0, 2)).tolist() == [1, 2]
    assert not layer.attention_weights(torch.randn(16)).any()


@torch.no_grad()
def test_places_are_not_rounded_in_half_precision():
    layer, tokens, queries = attention(), pyramid(), torch.randn(2, 4, 8)
    references = References.at_boxes(torch.rand(2, 4, 4), tokens, 2)
    expected = layer(queries, references, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        result = layer(queries, references, tokens)
    assert (result - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_attention_compiles_without_a_graph_break(backend):
    layer, tokens, queries = attention(), pyramid(), torch.randn(2, 4, 8)
    references = References.at_boxes(torch.rand(2, 4, 4), tokens, 2)
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    expected = layer(queries, references, tokens)
    torch.testing.assert_close(compiled(queries, references, tokens), expected)
