"""A batch norm over images, of which each process may have very few."""

import torch
from detectron2.utils import comm
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

__all__ = ["ImageNorm"]


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
