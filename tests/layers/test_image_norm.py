"""Standardizing over images."""

import copy

import pytest
import torch
from torch import nn

from dsrcnn.layers.norm import ImageNorm, norms_at_rest


def test_in_one_process_it_is_torchs_batch_norm():
    ours, theirs = ImageNorm(3), nn.BatchNorm1d(3, affine=False)
    for seed in range(3):
        torch.manual_seed(seed)
        x = (5 + 2 * torch.randn(4, 3)).requires_grad_()
        y = x.detach().clone().requires_grad_()
        weights = torch.randn(4, 3)
        (ours(x) * weights).sum().backward()
        (theirs(y) * weights).sum().backward()
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(ours(x), theirs(y), rtol=1e-4, atol=1e-6)
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(y))


def test_single_images_are_compared_with_those_before_them():
    norm = ImageNorm(2)
    generator = torch.Generator().manual_seed(0)
    images = torch.tensor([7.0, -3.0]) + torch.randn(400, 1, 2, generator=generator) * 0.5
    for image in images[:-1]:
        norm(image)
    assert norm.running_mean.tolist() == pytest.approx([7.0, -3.0], abs=0.5)
    assert norm.running_var.sqrt().tolist() == pytest.approx([0.5, 0.5], abs=0.25)
    before = copy.deepcopy(norm).eval()
    torch.testing.assert_close(norm(images[-1]), before(images[-1]))
    assert not torch.equal(norm.running_mean, before.running_mean)


@pytest.mark.parametrize("images", [1, 4])
@pytest.mark.parametrize("kind", [ImageNorm, nn.SyncBatchNorm, nn.BatchNorm1d])
def test_norms_at_rest_normalise_by_the_batch_and_remember_nothing(kind, images):
    norm, x = kind(3), torch.randn(images, 3)
    if images == 1 and kind is not ImageNorm:
        return  # those need two
    expected = copy.deepcopy(norm)(x)
    state = copy.deepcopy(norm.state_dict())
    with norms_at_rest(norm):
        torch.testing.assert_close(norm(x), expected)
    for key, value in norm.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_a_frozen_one_uses_and_keeps_its_statistics():
    norm = ImageNorm(3)
    norm(torch.randn(4, 3))
    before, x = copy.deepcopy(norm).eval(), torch.randn(4, 3)
    norm.frozen = True
    torch.testing.assert_close(norm.train()(x), before(x))
    assert torch.equal(norm.running_mean, before.running_mean)
