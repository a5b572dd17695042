"""Necks beside Detectron2's FPN: feature maps of a network to a pyramid of equal channels.

Level names are ``p2`` (stride 4) to ``p5``. All necks attach to the maps `in_features` of a network
`bottom_up`, finest first.
"""

import math

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import Backbone
from detectron2.modeling.backbone import FPN
from fvcore.nn import weight_init
from torch import Tensor, nn

_ROUNDS = 3  # of BiFPN, as in EfficientDet-D0


class PAFPN(FPN):
    """FPN and a bottom-up path from fine levels to coarse ones (PANet, arXiv 1803.01534)."""

    def __init__(
        self, bottom_up: Backbone, in_features: list[str], out_channels: int, norm: str = ""
    ) -> None:
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


class ChannelMapper(Backbone):
    """One convolution per level; levels are not fused."""

    def __init__(
        self,
        bottom_up: Backbone,
        in_features: list[str],
        out_channels: int,
        norm: str = "",
        shared_norm: bool = False,
    ) -> None:
        """Build the layers; with `shared_norm` all levels share one norm, as in AdaMixer."""
        super().__init__()
        self.bottom_up = bottom_up
        self.in_features = in_features
        inputs = [bottom_up.output_shape()[name] for name in in_features]
        self._shapes = {
            f"p{int(math.log2(x.stride))}": ShapeSpec(channels=out_channels, stride=x.stride)
            for x in inputs
        }
        self.convs = self._build_convs(inputs, out_channels, "" if shared_norm else norm)
        self.norm = get_norm(norm, out_channels) if shared_norm else None

    def _build_convs(self, inputs: list[ShapeSpec], channels: int, norm: str) -> nn.ModuleList:
        return nn.ModuleList(_conv(x.channels, channels, 1, norm) for x in inputs)

    @property
    def size_divisibility(self) -> int:
        """Divisor that the sides of images need."""
        return max(shape.stride for shape in self._shapes.values())

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and strides by level."""
        return self._shapes

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images (B, 3, H, W) to levels (B, D, H_l, W_l)."""
        maps = self.bottom_up(images)
        levels = [conv(maps[k]) for conv, k in zip(self.convs, self.in_features, strict=True)]
        return dict(zip(self._shapes, self.fuse(levels), strict=True))

    def fuse(self, levels: list[Tensor]) -> list[Tensor]:
        """Process levels of equal channels, finest first."""
        return levels if self.norm is None else [self.norm(x) for x in levels]


class InputProjection(ChannelMapper):
    """One convolution and norm per level, and a coarser level (Deformable DETR, 2010.04159, A.2).

    Convolutions have biases, which the groups of a norm do not cancel. The coarser level is a
    strided convolution of the coarsest map; padding of images to its stride is not needed.
    """

    def __init__(
        self, bottom_up: Backbone, in_features: list[str], out_channels: int, norm: str = ""
    ) -> None:
        super().__init__(bottom_up, in_features, out_channels, norm)
        self._divisibility = super().size_divisibility
        stride = 2 * self._divisibility
        coarser = ShapeSpec(channels=out_channels, stride=stride)
        self._shapes[f"p{int(math.log2(stride))}"] = coarser

    def _build_convs(self, inputs: list[ShapeSpec], channels: int, norm: str) -> nn.ModuleList:
        layers = [(x.channels, 1, 1) for x in inputs] + [(inputs[-1].channels, 3, 2)]
        return nn.ModuleList(
            _conv(count, channels, size, norm, stride, bias=True) for count, size, stride in layers
        )

    @property
    def size_divisibility(self) -> int:
        """Divisor that the sides of images need."""
        return self._divisibility

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images (B, 3, H, W) to levels (B, D, H_l, W_l)."""
        maps = self.bottom_up(images)
        names = [*self.in_features, self.in_features[-1]]
        levels = [conv(maps[name]) for conv, name in zip(self.convs, names, strict=True)]
        return dict(zip(self._shapes, levels, strict=True))


class BiFPN(ChannelMapper):
    """Levels fused top-down and bottom-up, three times, with learned weights (arXiv 1911.09070)."""

    def __init__(
        self, bottom_up: Backbone, in_features: list[str], out_channels: int, norm: str = ""
    ) -> None:
        super().__init__(bottom_up, in_features, out_channels, norm)
        count = len(in_features)
        self.rounds = nn.ModuleList(_FusionRound(count, out_channels, norm) for _ in range(_ROUNDS))

    def fuse(self, levels: list[Tensor]) -> list[Tensor]:
        """Fuse the levels round by round."""
        for fusion in self.rounds:
            levels = fusion(levels)
        return levels


class _FusionRound(nn.Module):
    """One top-down and one bottom-up pass; inner levels keep a connection to their input."""

    def __init__(self, levels: int, channels: int, norm: str) -> None:
        super().__init__()
        self.down = nn.ModuleList(_Fusion(2, channels, norm) for _ in range(levels - 1))
        inputs = [3] * (levels - 2) + [2]
        self.up = nn.ModuleList(_Fusion(n, channels, norm) for n in inputs)

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        """Fuse levels, finest first."""
        top_down = [levels[-1]]
        for level, fusion in zip(levels[-2::-1], self.down, strict=True):
            top_down.insert(0, fusion([level, _resize(top_down[0], level)]))
        fused = top_down[:1]
        for index, fusion in enumerate(self.up, start=1):
            inputs = [levels[index], _resize(fused[-1], levels[index])]
            if index < len(levels) - 1:
                inputs.insert(1, top_down[index])
            fused.append(fusion(inputs))
        return fused


class _Fusion(nn.Module):
    """Weighted mean of maps and a convolution (section 3.3, fast normalized fusion)."""

    def __init__(self, inputs: int, channels: int, norm: str) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.ones(inputs))
        self.depthwise = Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.pointwise = _conv(channels, channels, 1, norm)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Fuse maps of equal shape."""
        weights = self.weights.relu()
        weights = weights / (weights.sum() + 1e-4)
        mean = torch.stack([w * x for w, x in zip(weights.unbind(), maps, strict=True)]).sum(dim=0)
        result: Tensor = self.pointwise(self.depthwise(F.silu(mean)))
        return result


def _resize(x: Tensor, like: Tensor) -> Tensor:
    """Resize to `like`: half the size by max pooling, double by nearest neighbor."""
    if x.shape[-1] > like.shape[-1] or x.shape[-2] > like.shape[-2]:
        return F.max_pool2d(x, 3, stride=2, padding=1)
    return F.interpolate(x, size=like.shape[-2:], mode="nearest")


def _conv(
    inputs: int, outputs: int, size: int, norm: str, stride: int = 1, *, bias: bool = False
) -> Conv2d:
    conv = Conv2d(
        inputs, outputs, size, stride=stride, padding=size // 2, bias=bias or not norm,
        norm=get_norm(norm, outputs),
    )  # fmt: skip
    weight_init.c2_xavier_fill(conv)
    return conv
