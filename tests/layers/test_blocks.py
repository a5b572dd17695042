"""Small blocks of the stages."""

import torch
from torch import nn

from dsrcnn.layers.blocks import apply_in_float32


def test_scores_to_rank_by_are_never_rounded_to_half_precision():
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 1), torch.randn(2000, 64)
    nn.init.normal_(layer.weight, std=0.01)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded, found = layer(x), apply_in_float32(layer, x)
    assert len(rounded.unique()) < 1000
    assert torch.equal(found, layer(x))
    assert apply_in_float32(layer, x.bfloat16()).dtype == torch.float32
    assert apply_in_float32(layer.double(), x).dtype == torch.float64
    assert apply_in_float32(layer.half(), x).dtype == torch.float32
