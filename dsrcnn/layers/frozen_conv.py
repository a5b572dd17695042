"""Convolutions that carry their frozen normalisation inside.

A frozen BatchNorm is a fixed scale and shift per channel. Multiplying the scale into the weight
gives the same output without a pass over the activations, in training as well, since the gradient
reaches the weight through the product. Parameter and buffer names do not change.
"""

import torch.nn.functional as F
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import Tensor, nn

__all__ = ["FrozenNormConv2d", "fold_frozen_norms"]


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
