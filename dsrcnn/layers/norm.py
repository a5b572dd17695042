"""Batch norms that are to be used without being changed."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.utils import comm
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["FrozenNormConv2d", "ImageNorm", "fold_frozen_norms", "norms_at_rest"]


@contextmanager
def norms_at_rest(module: nn.Module) -> Iterator[None]:
    """Leave the running statistics of batch norms as they are.

    In training mode they still normalise by the batch. For a second look at a batch, which must not
    count twice: recomputation under activation checkpointing, or a pass that only counts.

    Args:
        module: all batch norms inside rest.
    """
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]
    before = [(m.momentum, m.num_batches_tracked) for m in norms]
    for norm, (_, count) in zip(norms, before, strict=True):
        norm.momentum = 0.0
        # A counter to count in vain: SyncBatchNorm insists on having one.
        norm.num_batches_tracked = None if count is None else count.clone()
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


class ImageNorm(nn.BatchNorm1d):
    """Mean 0 and variance 1 over the images of all processes, for every number by itself.

    ``SyncBatchNorm`` would do on GPUs. This one also works on CPUs, and takes a single image in
    training: that is compared with those before it, by running statistics, and then one of them.

    Attributes:
        frozen: use running statistics in training as well, and leave them as they are.
    """

    def __init__(self, numbers: int) -> None:
        """Make running statistics for so many numbers."""
        super().__init__(numbers, affine=False)
        self.frozen = False

    def forward(self, x: Tensor) -> Tensor:
        """(B, C) to (B, C), in the precision of the input."""
        assert self.running_mean is not None
        assert self.running_var is not None
        if not self.training or self.frozen:
            return self._standardized(x, self.running_mean, self.running_var)
        if len(x) == 1 and comm.get_world_size() == 1:
            mean, variance = self.running_mean.clone(), self.running_var.clone()
            self._remember(x[0], (x[0] - mean).square())
            return self._standardized(x, mean, variance)
        count = x.new_full((1,), len(x))
        total, count = _sum_over_processes(torch.cat([x.sum(dim=0), count])).split([x.shape[1], 1])
        mean = total / count
        squares = _sum_over_processes((x - mean).square().sum(dim=0))
        self._remember(mean, squares / (count - 1))
        return self._standardized(x, mean, squares / count)

    def _standardized(self, x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        return (x - mean) * (variance + self.eps).rsqrt()

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        share = self.momentum or 0.0
        self.running_mean.lerp_(mean.to(self.running_mean), share)
        self.running_var.lerp_(variance.to(self.running_var), share)
        if share and self.num_batches_tracked is not None:
            self.num_batches_tracked += 1


def _sum_over_processes(value: Tensor) -> Tensor:
    """The same on all of them; gradients come back from all of them."""
    return value if comm.get_world_size() == 1 else all_reduce(value)


class FrozenNormConv2d(nn.Conv2d):
    """A bias-free convolution followed by a frozen BatchNorm, computed as one convolution."""

    def __init__(self, conv: Conv2d) -> None:
        """Take over weight, norm and activation of `conv`; the parameters stay the same objects."""
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            bias=False,
            device="meta",  # no memory and no random numbers for a weight replaced right away
        )
        self.weight = conv.weight
        self.norm = conv.norm
        self.activation = conv.activation

    def forward(self, x: Tensor) -> Tensor:
        """Convolve with the scaled weight; the frozen shift is the bias."""
        norm = self.norm
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        shift = norm.bias - norm.running_mean * scale
        x = F.conv2d(
            x,
            self.weight * scale.view(-1, 1, 1, 1),
            shift,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
        )
        return x if self.activation is None else self.activation(x)


def fold_frozen_norms(module: nn.Module) -> int:
    """Replace every Detectron2 convolution with a frozen norm below `module`.

    Returns:
        The number of convolutions replaced.
    """
    count = 0
    for name, child in module.named_children():
        is_frozen = type(child) is Conv2d and isinstance(child.norm, FrozenBatchNorm2d)
        if is_frozen and child.bias is None:
            setattr(module, name, FrozenNormConv2d(child))
            count += 1
        else:
            count += fold_frozen_norms(child)
    return count
