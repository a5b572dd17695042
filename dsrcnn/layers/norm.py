"""Batch norms: fixed statistics, statistics over all processes, and frozen ones."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.utils import comm
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules.batchnorm import _BatchNorm


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


class ImageNorm(nn.BatchNorm1d):
    """Standardize every channel over the images of all processes.

    Unlike ``SyncBatchNorm`` it also works on CPUs and with a single image in training, which is
    standardized by the running statistics of earlier ones before it updates them.

    Attributes:
        frozen: use running statistics in training, too, and do not update them.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, affine=False)
        self.frozen = False

    def forward(self, x: Tensor) -> Tensor:
        """(B, C) to (B, C), in the precision of the input."""
        assert self.running_mean is not None
        assert self.running_var is not None
        if not self.training or self.frozen:
            return self._standardize(x, self.running_mean, self.running_var)
        if len(x) == 1 and comm.get_world_size() == 1:
            mean, variance = self.running_mean.clone(), self.running_var.clone()
            self._update(x[0], (x[0] - mean).square())
            return self._standardize(x, mean, variance)
        count = x.new_full((1,), len(x))
        total, count = _sum_over_processes(torch.cat([x.sum(dim=0), count])).split([x.shape[1], 1])
        mean = total / count
        squares = _sum_over_processes((x - mean).square().sum(dim=0))
        self._update(mean, squares / (count - 1))
        return self._standardize(x, mean, squares / count)

    def _standardize(self, x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        return (x - mean) * (variance + self.eps).rsqrt()

    @torch.no_grad()
    def _update(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        momentum = self.momentum or 0.0
        self.running_mean.lerp_(mean.to(self.running_mean), momentum)
        self.running_var.lerp_(variance.to(self.running_var), momentum)
        if momentum and self.num_batches_tracked is not None:
            self.num_batches_tracked += 1


def _sum_over_processes(value: Tensor) -> Tensor:
    """Sum over processes, with the gradients of all of them."""
    return value if comm.get_world_size() == 1 else all_reduce(value)


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
