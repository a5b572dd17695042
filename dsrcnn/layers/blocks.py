"""Small blocks and initializations shared by the stages."""

import math

import torch
from torch import Tensor, nn

_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU}


def activation_from_name(name: str) -> nn.Module:
    """Return a new activation layer, "relu" or "gelu"."""
    return _ACTIVATIONS[name]()


def linear_norm_act(
    channels: int, repeats: int, *, bias: bool = False, activation: str = "relu"
) -> nn.Sequential:
    """Stack `repeats` times a linear layer, LayerNorm and an activation, all of `channels`."""
    layers: list[nn.Module] = []
    for _ in range(repeats):
        linear = nn.Linear(channels, channels, bias=bias)
        layers += [linear, nn.LayerNorm(channels), activation_from_name(activation)]
    return nn.Sequential(*layers)


def initialize_xavier(module: nn.Module) -> None:
    """Initialize matrices in `module` by Xavier-uniform; vectors keep their layer's default."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)


def prior_bias(probability: float) -> float:
    """Return the logit of `probability` (RetinaNet's prior, arXiv 1708.02002)."""
    return -math.log((1.0 - probability) / probability)


def apply_in_float32(layer: nn.Linear, x: Tensor) -> Tensor:
    """Apply a layer to `x` outside of autocast, for scores to rank by and for boxes.

    Of bfloat16 hundreds of scores of an image are equal, and which of them are best is chance. The
    result is float64 if the layer is, and float32 otherwise.
    """
    with torch.autocast(x.device.type, enabled=False):
        result: Tensor = layer(x.to(layer.weight.dtype))
    return result if result.dtype == torch.float64 else result.float()
