"""Batch norms: preserved statistics, running ones in training, and frozen ones."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..utils.distributed import reduce_mean
from ..utils.training import iteration_ends
from .constants import held


@contextmanager
def preserve_bn_stats(module: nn.Module) -> Iterator[None]:
    """Do not update the running statistics of the batch norms in `module`.

    In training mode they still normalize by the batch. For a second pass over a batch, which must
    not count twice: recomputation under activation checkpointing, or a pass that only counts.
    """
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]
    before = [(m.momentum, m.num_batches_tracked) for m in norms]
    for norm, (_, count) in zip(norms, before, strict=True):
        norm.momentum = 0.0
        # A copy of the counter: SyncBatchNorm needs one.
        norm.num_batches_tracked = None if count is None else count.clone()
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


class RunningNorm(nn.BatchNorm1d):
    """Standardize every channel by running statistics, in training as in evaluation.

    An image's output does not depend on the others of its batch, and single images will do. The
    statistics are those of earlier training steps, over the images of all processes; gradients
    treat them as constants. They change only in passes with gradients, so that passes that merely
    count or estimate other statistics leave them alone, and only in the last part of an iteration,
    so that all parts see the same.

    Attributes:
        frozen: do not update the statistics in training.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, affine=False)
        self.frozen = False

    def forward(self, x: Tensor) -> Tensor:
        """(B, C) to (B, C), in the precision of the input."""
        assert self.running_mean is not None
        assert self.running_var is not None
        # Copies: what the backward pass keeps must not change.
        mean, variance = self.running_mean.clone(), self.running_var.clone()
        learns = self.training and not self.frozen and bool(self.momentum)
        if learns and torch.is_grad_enabled() and iteration_ends():
            self._update(x.detach(), mean)
        return (x - mean) * (variance + self.eps).rsqrt()

    @torch.no_grad()
    def _update(self, x: Tensor, mean: Tensor) -> None:
        """Average with the batch; at first with equal weights for all steps."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        # Around the running mean: the variance of one image around its own would be 0.
        moments = reduce_mean(torch.stack([x.sum(dim=0), (x - mean).square().sum(dim=0)]))
        mean_of_batch, variance = moments / reduce_mean(x.new_full((), len(x)))
        momentum = (1 / (self.num_batches_tracked + 2)).clamp(min=self.momentum).to(mean)
        self.running_mean.lerp_(mean_of_batch.to(mean), momentum)
        self.running_var.lerp_(variance.to(mean), momentum)
        self.num_batches_tracked += 1


class FrozenNormConv2d(nn.Conv2d):
    """Convolution without bias and a frozen batch norm, computed as one convolution.

    What does not depend on trained weights is computed once, not in every pass: the scale and shift
    of the norm; and their product with the weight where it needs no gradient.
    """

    def __init__(self, conv: Conv2d) -> None:
        """Share weight, norm and activation with `conv`."""
        shape = (conv.in_channels, conv.out_channels, conv.kernel_size)
        geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
        # On meta: no memory and no random numbers for a weight that is replaced right away.
        super().__init__(*shape, *geometry, bias=False, device="meta")
        self.weight = conv.weight
        self.norm = conv.norm
        self.activation = conv.activation
        self._affine = _Cached()
        self._product = _Cached()

    def train(self, mode: bool = True) -> "FrozenNormConv2d":
        """Set the mode, and drop what was computed for the other."""
        self._affine.clear()
        self._product.clear()
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve with the scaled weight and the shift as bias."""
        weight, shift = self._folded()
        x = F.conv2d(x, weight, shift, self.stride, self.padding, self.dilation, self.groups)
        return x if self.activation is None else self.activation(x)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """Return the same function as a convolution with bias, and its activation."""
        scale, shift = _scale_and_shift(self.norm)
        shape = (self.in_channels, self.out_channels, self.kernel_size)
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        build: Any = nn.Conv2d
        conv: nn.Conv2d = build(*shape, *geometry, bias=True, device="meta")
        # The memory format of the product is that of the weight.
        conv.weight, conv.bias = nn.Parameter(self.weight * scale), nn.Parameter(shift)
        return conv if self.activation is None else _Activated(conv, self.activation)

    def _folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the one convolution, in the precision of autocast if they are kept."""
        norm, weight = self.norm, self.weight
        if torch.compiler.is_compiling():  # the compiler folds them itself
            scale, shift = _scale_and_shift(norm)
            return weight * scale, shift
        statistics = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        scale, shift = self._affine(lambda: _scale_and_shift(norm), statistics)
        if weight.requires_grad and torch.is_grad_enabled():
            return weight * scale, shift
        dtype = autocast_dtype(weight)

        def product() -> tuple[Tensor, Tensor]:
            return (weight * scale).to(dtype), shift.to(dtype)

        return self._product(product, (weight, *statistics), dtype)


class _Activated(nn.Module):
    def __init__(self, layer: nn.Module, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = layer
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.layer(x))


class _Cached:
    """Tensors that are computed again when those that they depend on have changed.

    Changes are seen by address and version, so not those of ``x.data`` in place.
    """

    def __init__(self) -> None:
        # Key, values, and the inputs, so that no address is used again. One attribute: predictions
        # may run in several threads.
        self._entry: tuple[tuple[object, ...], tuple[Tensor, Tensor], list[Tensor]] | None = None

    def __call__(
        self,
        compute: Callable[[], tuple[Tensor, Tensor]],
        inputs: Sequence[Tensor],
        *settings: object,
    ) -> tuple[Tensor, Tensor]:
        key = (*((x.data_ptr(), x._version, x.dtype, x.device) for x in inputs), *settings)
        entry = self._entry
        if entry is None or entry[0] != key:
            # Not inference tensors, which a later training step could not use.
            with torch.inference_mode(False), torch.no_grad():
                entry = key, compute(), [x.detach() for x in inputs]
            self._entry = entry
        return held(entry[1])

    def clear(self) -> None:
        self._entry = None


def _scale_and_shift(norm: FrozenBatchNorm2d) -> tuple[Tensor, Tensor]:
    """Scale (C, 1, 1, 1) and shift (C,) of a frozen norm."""
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return scale.view(-1, 1, 1, 1), norm.bias - norm.running_mean * scale


def autocast_dtype(x: Tensor) -> torch.dtype:
    """Precision in which autocast computes with `x`; its own without autocast."""
    kind = x.device.type
    is_cast = x.dtype == torch.float32 and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if is_cast else x.dtype


def fold_frozen_norms(module: nn.Module) -> None:
    """Replace Detectron2's convolutions with a frozen norm in `module`, in place."""
    for name, child in module.named_children():
        is_frozen = type(child) is Conv2d and isinstance(child.norm, FrozenBatchNorm2d)
        if is_frozen and child.bias is None:
            setattr(module, name, FrozenNormConv2d(child))
        else:
            fold_frozen_norms(child)


def merge_frozen_norms(module: nn.Module) -> None:
    """Turn the convolutions of `fold_frozen_norms` into plain ones with bias, in place.

    For exported models; the norms are gone, so that checkpoints no longer fit.
    """
    for name, child in module.named_children():
        if isinstance(child, FrozenNormConv2d):
            setattr(module, name, child.merged())
        else:
            merge_frozen_norms(child)
