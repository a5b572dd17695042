"""Batch norms: preserved statistics, running ones in training, and frozen ones."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..utils.distributed import reduce_mean
from ..utils.training import iteration_ends


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
    """Convolution without bias and a frozen batch norm, computed as one convolution."""

    def __init__(self, conv: Conv2d) -> None:
        """Share weight, norm and activation with `conv`."""
        shape = (conv.in_channels, conv.out_channels, conv.kernel_size)
        geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
        # On meta: no memory and no random numbers for a weight that is replaced right away.
        super().__init__(*shape, *geometry, bias=False, device="meta")
        self.weight = conv.weight
        self.norm = conv.norm
        self.activation = conv.activation

    def forward(self, x: Tensor) -> Tensor:
        """Convolve with the scaled weight and the shift as bias."""
        norm = self.norm
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        shift = norm.bias - norm.running_mean * scale
        weight = self.weight * scale.view(-1, 1, 1, 1)
        x = F.conv2d(x, weight, shift, self.stride, self.padding, self.dilation, self.groups)
        return x if self.activation is None else self.activation(x)


def fold_frozen_norms(module: nn.Module) -> None:
    """Replace Detectron2's convolutions with a frozen norm in `module`, in place."""
    for name, child in module.named_children():
        is_frozen = type(child) is Conv2d and isinstance(child.norm, FrozenBatchNorm2d)
        if is_frozen and child.bias is None:
            setattr(module, name, FrozenNormConv2d(child))
        else:
            fold_frozen_norms(child)
