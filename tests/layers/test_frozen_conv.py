import copy

import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import nn

from dsrcnn.layers.norm import FrozenNormConv2d, fold_frozen_norms


def convolutions():
    norm = FrozenBatchNorm2d(6)
    for name in ("weight", "bias", "running_mean"):
        getattr(norm, name).copy_(torch.randn(6))
    norm.running_var.copy_(torch.rand(6) + 0.5)
    return nn.Sequential(
        Conv2d(3, 6, 3, stride=2, padding=1, bias=False, norm=norm, activation=torch.relu),
        Conv2d(6, 4, 1, norm=nn.BatchNorm2d(4), bias=False),
        Conv2d(4, 4, 1),
    )


def test_only_convolutions_with_a_frozen_norm_are_folded():
    model = convolutions()
    assert fold_frozen_norms(model) == 1
    assert [type(m) for m in model] == [FrozenNormConv2d, Conv2d, Conv2d]


@pytest.mark.parametrize("needs_grad", [False, True])
def test_outputs_and_gradients_stay_the_same(needs_grad):
    plain = convolutions()
    folded = copy.deepcopy(plain)
    fold_frozen_norms(folded)
    x = torch.randn(2, 3, 9, 9, requires_grad=needs_grad)
    results = []
    for model in (plain, folded):
        y = model(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), model[0].weight)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


def test_state_dict_and_parameters_stay_the_same():
    model = convolutions()
    before, parameters = copy.deepcopy(model.state_dict()), list(model.parameters())
    fold_frozen_norms(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


def test_statistics_loaded_later_are_used():
    model = convolutions()
    fold_frozen_norms(model)
    x = torch.randn(1, 3, 5, 5)
    before = model(x)
    model[0].norm.bias.add_(1.0)
    assert not torch.allclose(model(x), before)
