"""Undo single optimisations of a built model, to measure what each of them brings.

With all of them undone the model computes the common way: the operations of the official code on
Detectron2's own layers. Results stay the same to rounding.
"""

from typing import Any

import torch
from detectron2.layers import Conv2d
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from torch import Tensor, nn

from dsrcnn.layers.norm import FrozenNormConv2d
from dsrcnn.modeling.decoder import RoIFeatures

__all__ = ["OPTIMISATIONS", "level_wise_pooling", "plain_optimizer", "undo"]


def _unfold_norms(module: nn.Module) -> None:
    """Convolution, then frozen norm, as two passes."""
    for name, child in module.named_children():
        if isinstance(child, FrozenNormConv2d):
            conv = Conv2d(
                child.in_channels,
                child.out_channels,
                child.kernel_size,
                child.stride,
                child.padding,
                child.dilation,
                child.groups,
                bias=False,
                norm=child.norm,
                activation=child.activation,
            )
            conv.weight = child.weight
            setattr(module, name, conv)
        else:
            _unfold_norms(child)


def _channels_first(backbone: nn.Module) -> None:
    """The default memory layout."""
    backbone.to(memory_format=torch.contiguous_format)
    backbone.register_forward_pre_hook(lambda _, args: (args[0].contiguous(),))


class _LevelwisePooling(nn.Module):
    """Detectron2's pooler, level by level, and the permutations the stages then need."""

    def __init__(self, strides: tuple[int, ...], resolution: int, samples: int) -> None:
        super().__init__()
        scales = tuple(1.0 / s for s in strides)
        self.pooler = ROIPooler(resolution, scales, samples, "ROIAlignV2")

    def prepare(self, features: list[Tensor]) -> list[Tensor]:
        return features

    def forward(self, features: list[Tensor], boxes: Tensor) -> Tensor:
        pooled = self.pooler(features, [Boxes(b) for b in boxes])
        return pooled.flatten(2).permute(2, 0, 1).permute(1, 0, 2)


def level_wise_pooling(own: RoIFeatures) -> nn.Module:
    """What pools like `own`, the common way."""
    return _LevelwisePooling(own.strides, own.resolution, own.samples)


def _pool_by_level(model: Any) -> None:
    model.head.roi_features = level_wise_pooling(model.head.roi_features)


OPTIMISATIONS = {
    "norms": lambda model: _unfold_norms(model.backbone),
    "layout": lambda model: _channels_first(model.backbone),
    "pooling": _pool_by_level,
}


def undo(model: nn.Module, names: list[str]) -> None:
    """Undo the named optimisations of `model`, in place."""
    for name in names:
        OPTIMISATIONS[name](model)


def plain_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """AdamW as the official code runs it: a group per parameter, not fused."""
    groups = [
        {"params": [p], "lr": group["lr"], "weight_decay": group["weight_decay"]}
        for group in optimizer.param_groups
        for p in group["params"]
    ]
    return torch.optim.AdamW(groups)
