"""Necks: from the feature maps of a network to a pyramid of equal channels.

Detectron2's FPN is the first; these are the others. Level names are ``p2`` (stride 4) to ``p5``.
"""

import math

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import Backbone
from detectron2.modeling.backbone import FPN
from fvcore.nn import weight_init
from torch import Tensor, nn

__all__ = ["PAFPN", "BiFPN", "ChannelMapper"]


class PAFPN(FPN):
    """FPN, then a way back up: fine levels reach coarse ones in few steps (arXiv 1803.01534)."""

    def __init__(
        self, bottom_up: Backbone, in_features: list[str], out_channels: int, norm: str = ""
    ) -> None:
        """Attach to the maps `in_features` of `bottom_up`, finest first."""
        super().__init__(bottom_up, in_features, out_channels, norm)
        steps = range(len(in_features) - 1)
        self.down = nn.ModuleList(_conv(out_channels, out_channels, 3, norm, 2) for _ in steps)
        self.fuse = nn.ModuleList(_conv(out_channels, out_channels, 3, norm) for _ in steps)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images (B, 3, H, W) to levels (B, D, H_l, W_l)."""
        levels = super().forward(images)
        names = list(levels)
        for finer, name, down, fuse in zip(names, names[1:], self.down, self.fuse, strict=False):
            levels[name] = fuse(levels[name] + down(levels[finer]))
        return levels


class _Neck(Backbone):
    """What all others share: the network below, and the names of the levels."""

    def __init__(self, bottom_up: Backbone, in_features: list[str], out_channels: int) -> None:
        super().__init__()
        self.bottom_up = bottom_up
        self.in_features = in_features
        shapes = bottom_up.output_shape()
        self._in_channels = [shapes[name].channels for name in in_features]
        strides = [shapes[name].stride for name in in_features]
        self._shapes = {
            f"p{int(math.log2(s))}": ShapeSpec(channels=out_channels, stride=s) for s in strides
        }

    @property
    def size_divisibility(self) -> int:
        """What sides of images must be a multiple of."""
        return max(shape.stride for shape in self._shapes.values())

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and strides by level."""
        return self._shapes

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images (B, 3, H, W) to levels (B, D, H_l, W_l)."""
        maps = self.bottom_up(images)
        levels = self.pyramid([maps[name] for name in self.in_features])
        return dict(zip(self._shapes, levels, strict=True))

    def pyramid(self, maps: list[Tensor]) -> list[Tensor]:
        """Levels from the maps of the network below, finest first."""
        raise NotImplementedError


class ChannelMapper(_Neck):
    """One convolution per level, which brings all to equal channels and mixes none."""

    def __init__(
        self,
        bottom_up: Backbone,
        in_features: list[str],
        out_channels: int,
        norm: str = "",
        shared_norm: bool = False,
    ) -> None:
        """Attach to the maps `in_features` of `bottom_up`, finest first.

        With `shared_norm` all levels go through the same norm, as in AdaMixer.
        """
        super().__init__(bottom_up, in_features, out_channels)
        own = "" if shared_norm else norm
        self.convs = nn.ModuleList(_conv(c, out_channels, 1, own) for c in self._in_channels)
        self.norm = get_norm(norm, out_channels) if shared_norm else None

    def pyramid(self, maps: list[Tensor]) -> list[Tensor]:
        """Each by itself."""
        levels = [conv(x) for conv, x in zip(self.convs, maps, strict=True)]
        return levels if self.norm is None else [self.norm(x) for x in levels]


class BiFPN(_Neck):
    """Levels fused down and up again, several times, with learned weights (arXiv 1911.09070)."""

    def __init__(
        self,
        bottom_up: Backbone,
        in_features: list[str],
        out_channels: int,
        norm: str = "",
        rounds: int = 3,
    ) -> None:
        """Attach to the maps `in_features` of `bottom_up`, finest first; fuse `rounds` times."""
        super().__init__(bottom_up, in_features, out_channels)
        self.convs = nn.ModuleList(_conv(c, out_channels, 1, norm) for c in self._in_channels)
        count = len(in_features)
        self.rounds = nn.ModuleList(_FusionRound(count, out_channels, norm) for _ in range(rounds))

    def pyramid(self, maps: list[Tensor]) -> list[Tensor]:
        """To equal channels, then round after round."""
        levels = [conv(x) for conv, x in zip(self.convs, maps, strict=True)]
        for fusion in self.rounds:
            levels = fusion(levels)
        return levels


class _FusionRound(nn.Module):
    """Coarse to fine, then fine to coarse; levels in the middle also see what they were before."""

    def __init__(self, levels: int, channels: int, norm: str) -> None:
        super().__init__()
        self.down = nn.ModuleList(_Fusion(2, channels, norm) for _ in range(levels - 1))
        inputs = [3] * (levels - 2) + [2]
        self.up = nn.ModuleList(_Fusion(n, channels, norm) for n in inputs)

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        """Levels, finest first."""
        middle = [levels[-1]]  # from the coarsest down to the finest
        for level, fusion in zip(levels[-2::-1], self.down, strict=True):
            middle.insert(0, fusion([level, _resized(middle[0], level)]))
        fused = middle[:1]
        for index, fusion in enumerate(self.up, start=1):
            inputs = [levels[index], _resized(fused[-1], levels[index])]
            if index < len(levels) - 1:
                inputs.insert(1, middle[index])
            fused.append(fusion(inputs))
        return fused


class _Fusion(nn.Module):
    """A weighted mean of maps, then a convolution (section 3.3, fast normalised fusion)."""

    def __init__(self, inputs: int, channels: int, norm: str) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.ones(inputs))
        self.depthwise = Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.pointwise = _conv(channels, channels, 1, norm)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Maps of equal shape to one."""
        weights = self.weights.relu()
        weights = weights / (weights.sum() + 1e-4)
        mean = torch.stack([w * x for w, x in zip(weights.unbind(), maps, strict=True)]).sum(dim=0)
        result: Tensor = self.pointwise(self.depthwise(F.silu(mean)))
        return result


def _resized(x: Tensor, like: Tensor) -> Tensor:
    """Half the size by the maximum of 2 x 2, or double by repetition."""
    if x.shape[-1] > like.shape[-1] or x.shape[-2] > like.shape[-2]:
        return F.max_pool2d(x, 3, stride=2, padding=1)
    return F.interpolate(x, size=like.shape[-2:], mode="nearest")


def _conv(inputs: int, outputs: int, size: int, norm: str, stride: int = 1) -> Conv2d:
    conv = Conv2d(
        inputs, outputs, size, stride=stride, padding=size // 2, bias=not norm,
        norm=get_norm(norm, outputs),
    )  # fmt: skip
    weight_init.c2_xavier_fill(conv)
    return conv
