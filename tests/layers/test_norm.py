"""Batch norms: running statistics, preserved statistics, folded frozen norms."""

import copy

import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import nn

from dsrcnn.layers.norm import FrozenNormConv2d, RunningNorm, fold_frozen_norms, preserve_bn_stats
from dsrcnn.utils.training import use_training_context


def test_the_running_norm_standardizes_by_earlier_steps_in_training_and_evaluation():
    norm, generator = RunningNorm(2), torch.Generator().manual_seed(0)
    images = torch.tensor([7.0, -3.0]) + torch.randn(400, 4, 2, generator=generator) * 0.5
    for image in images[:-1]:
        norm(image)
    assert norm.running_mean.tolist() == pytest.approx([7.0, -3.0], abs=0.3)
    assert norm.running_var.sqrt().tolist() == pytest.approx([0.5, 0.5], abs=0.15)
    before = copy.deepcopy(norm).eval()
    torch.testing.assert_close(norm(images[-1]), before(images[-1]))
    assert not torch.equal(norm.running_mean, before.running_mean)
    torch.testing.assert_close(before(images[-1])[:1], before(images[-1][:1]))


def test_statistics_of_the_running_norm_are_means_at_first():
    """Steps count alike, together with the 0 and 1 of the start, until momentum takes over."""
    norm = RunningNorm(1)
    for value in (3.0, 6.0):
        norm(torch.full((5, 1), value))
    assert norm.running_mean.item() == pytest.approx(3.0)  # of 0, 3, 6
    # Squares around the mean before each step: 1, 9 and (6 - 1.5)^2.
    assert norm.running_var.item() == pytest.approx((1 + 9 + 20.25) / 3)
    for _ in range(100):
        norm(torch.full((5, 1), 4.0))
    assert norm.running_mean.item() == pytest.approx(4.0, abs=1e-3)


def test_single_images_are_standardized_by_statistics_of_earlier_ones():
    norm, generator = RunningNorm(2), torch.Generator().manual_seed(0)
    for image in torch.tensor([7.0, -3.0]) + torch.randn(400, 1, 2, generator=generator) * 0.5:
        norm(image)
    assert norm.running_var.sqrt().tolist() == pytest.approx([0.5, 0.5], abs=0.25)


def test_all_parts_of_an_iteration_see_the_same_statistics_and_the_last_one_updates_them():
    norm, x = RunningNorm(2), torch.randn(4, 2) + 3
    with use_training_context(ends_iteration=False):
        first = norm(x)
    torch.testing.assert_close(norm(x), first)
    assert norm.num_batches_tracked == 1


def test_a_frozen_running_norm_and_passes_without_gradients_keep_the_statistics():
    norm, x = RunningNorm(3), torch.randn(4, 3)
    norm(torch.randn(4, 3))
    before = copy.deepcopy(norm).eval()
    with torch.no_grad():
        torch.testing.assert_close(norm.train()(x), before(x))
    norm.frozen = True
    torch.testing.assert_close(norm(x), before(x))
    assert torch.equal(norm.running_mean, before.running_mean)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [(RunningNorm, (1, 3)), (RunningNorm, (4, 3)), (nn.SyncBatchNorm, (4, 3)),
     (nn.BatchNorm1d, (4, 3)), (nn.BatchNorm2d, (2, 3, 4, 4))],
)  # fmt: skip
def test_preserved_norms_normalize_by_the_batch_and_update_nothing_until_afterwards(kind, shape):
    norm, x = kind(3), torch.randn(shape) * 5 + 2
    expected, state = copy.deepcopy(norm)(x), copy.deepcopy(norm.state_dict())
    with preserve_bn_stats(norm):
        torch.testing.assert_close(norm(x), expected)
    assert all(torch.equal(value, state[key]) for key, value in norm.state_dict().items())
    norm(x)
    assert not torch.equal(norm.running_mean, state["running_mean"])


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


@pytest.mark.parametrize("needs_grad", [False, True])
def test_folding_keeps_outputs_and_gradients(needs_grad):
    plain = convolutions()
    folded = copy.deepcopy(plain)
    fold_frozen_norms(folded)
    x = torch.randn(2, 3, 9, 9, requires_grad=needs_grad)
    results = []
    for model in (plain, folded):
        y = model(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), model[0].weight)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


def test_only_frozen_norms_are_folded_and_the_state_dict_and_parameters_stay():
    model = convolutions()
    before, parameters = copy.deepcopy(model.state_dict()), list(model.parameters())
    fold_frozen_norms(model)
    assert [type(m) for m in model] == [FrozenNormConv2d, Conv2d, Conv2d]
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


def test_folded_norms_use_statistics_that_are_loaded_later():
    model, x = convolutions(), torch.randn(1, 3, 5, 5)
    fold_frozen_norms(model)
    before = model(x)
    model[0].norm.bias.add_(1.0)
    assert not torch.allclose(model(x), before)


def folded_convolution():
    model = convolutions()[:1].eval()
    fold_frozen_norms(model)
    return model, torch.randn(1, 3, 5, 5)


def unfolded(model, x):
    conv = model[0]
    return conv.activation(conv.norm(nn.functional.conv2d(x, conv.weight, None, 2, 1)))


@pytest.mark.parametrize("change", ["load", "step", "swap", "norm", "double"])
@torch.no_grad()
def test_what_is_computed_once_follows_changes_of_weights_and_statistics(change):
    model, x = folded_convolution()
    torch.testing.assert_close(model(x), unfolded(model, x), rtol=1e-4, atol=1e-5)
    if change == "load":
        state = {k: torch.rand_like(v) + 0.5 for k, v in model.state_dict().items()}
        model.load_state_dict(state)
    elif change == "step":
        model[0].weight.add_(1.0)
    elif change == "swap":  # as the average of the weights is swapped in
        model[0].weight.data = torch.randn_like(model[0].weight)
    elif change == "norm":
        model[0].norm.running_var.mul_(3.0)
    else:
        model, x = model.double(), x.double()
    torch.testing.assert_close(model(x), unfolded(model, x), rtol=1e-4, atol=1e-5)


def test_weights_are_folded_once_in_evaluation_and_trained_afterwards():
    model, x = folded_convolution()
    with torch.inference_mode():
        first = model(x)
    with torch.no_grad():
        kept = model[0]._folded()
        assert all(a is b for a, b in zip(model[0]._folded(), kept, strict=True))
        torch.testing.assert_close(model(x), first.clone())
    model.train()
    model(x).sum().backward()
    assert model[0].weight.grad.abs().sum() > 0


@torch.no_grad()
def test_folded_weights_are_kept_in_the_precision_of_autocast():
    model, x = folded_convolution()
    with torch.autocast("cpu", torch.bfloat16):
        assert model[0]._folded()[0].dtype == torch.bfloat16
        expected = unfolded(model, x).float()
        torch.testing.assert_close(model(x).float(), expected, rtol=0.05, atol=0.1)
    assert model[0]._folded()[0].dtype == torch.float32
