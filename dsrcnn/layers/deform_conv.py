"""Deformable convolutions by torchvision, for a Detectron2 without compiled extension.

They also run on CPUs, unlike Detectron2's compiled `ModulatedDeformConv`.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from ..compat import has_compiled_extension


class DeformConv(nn.Module):
    """Deformable convolution (arXiv 1703.06211) with the arguments and keys of Detectron2's."""

    has_bias = False  # default of Detectron2's class

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        deformable_groups: int = 1,
        bias: bool | None = None,
        norm: nn.Module | None = None,
        activation: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Build the layer; `deformable_groups` follow from the shape of the offsets."""
        super().__init__()
        bias = self.has_bias if bias is None else bias
        del deformable_groups
        self.stride, self.padding, self.dilation = stride, padding, dilation
        shape = (out_channels, in_channels // groups, kernel_size, kernel_size)
        self.weight = nn.Parameter(torch.empty(shape))
        nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.norm = norm
        self.activation = activation

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        """Convolve at positions shifted by `offset`.

        Args:
            x: (B, C, H, W).
            offset: (B, 2 * groups * K * K, H', W'), y before x.
            mask: (B, groups * K * K, H', W') factors; None for ones.
        """
        out: Tensor = deform_conv2d(
            x, offset, self.weight, self.bias, self.stride, self.padding, self.dilation, mask
        )
        out = self.norm(out) if self.norm is not None else out
        return self.activation(out) if self.activation is not None else out


class ModulatedDeformConv(DeformConv):
    """Deformable convolution with a factor per sample (DCNv2, arXiv 1811.11168)."""

    has_bias = True


def provide_deform_conv() -> None:
    """Let Detectron2's ResNets build these classes if its compiled extension is missing."""
    if has_compiled_extension():
        return
    import detectron2.layers
    import detectron2.modeling.backbone.resnet

    for module in (detectron2.layers, detectron2.modeling.backbone.resnet):
        module.DeformConv = DeformConv
        module.ModulatedDeformConv = ModulatedDeformConv
