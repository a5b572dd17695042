"""Optimizer groups with learning rate factors, and clipping of the whole model's gradient."""

from collections import defaultdict
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver.build import maybe_add_gradient_clipping
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import ConfigError
from ..layers.deformable_attention import PointLinear
from ..utils.training import SplitBackbone

_NORMS = (_BatchNorm, nn.LayerNorm, nn.GroupNorm)
# Learned positions of timm's transformers, absolute and relative.
_POSITION_TABLES = ("pos_embed", "absolute_pos_embed", "relative_position_bias_table")
_BOTTOM_UP = "backbone.bottom_up"  # a backbone with a neck, such as Detectron2's FPN


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Build AdamW or SGD over all trainable parameters.

    The learning rate of parameters under ``backbone`` is multiplied by
    ``SOLVER.BACKBONE_MULTIPLIER`` (that of its neck by ``SOLVER.NECK_MULTIPLIER`` if set) and, for
    each part below the last, by ``SOLVER.LAYER_DECAY``; that of a `PointLinear` by its own factor.
    Weight decay applies to everything, as in the official code, except for the kinds in
    ``SOLVER.NO_DECAY``.

    Parameters with equal settings share a group: several times faster than a group each, with the
    same result. Clipping of type ``full_model`` is left to the training loop (`clip_full_model`),
    since it comes between unscaling and step; other types use Detectron2's wrapper.

    Raises:
        ConfigError: for a learning rate of a neck that the backbone does not have.
    """
    solver = cfg.SOLVER
    has_neck = _BOTTOM_UP in dict(model.named_modules())
    if solver.NECK_MULTIPLIER is not None and not has_neck:
        raise ConfigError(
            f"SOLVER.NECK_MULTIPLIER is {solver.NECK_MULTIPLIER}, but the backbone "
            f"{cfg.MODEL.BACKBONE.NAME} has no neck; remove it."
        )
    depth_factors = _depth_factors(model, solver.LAYER_DECAY)
    point_factors = _point_factors(model)
    without_decay = _parameters_without_decay(model, solver.NO_DECAY)
    groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        factor = point_factors.get(name, 1.0)
        if "backbone" in name:
            in_neck = has_neck and not name.startswith(f"{_BOTTOM_UP}.")
            as_neck = in_neck and solver.NECK_MULTIPLIER is not None
            factor = float(solver.NECK_MULTIPLIER if as_neck else solver.BACKBONE_MULTIPLIER)
        rate, decay = solver.BASE_LR * factor, solver.WEIGHT_DECAY
        if name.endswith("bias"):  # Detectron2's keys, without effect by default
            rate *= solver.BIAS_LR_FACTOR
            decay = decay if solver.WEIGHT_DECAY_BIAS is None else solver.WEIGHT_DECAY_BIAS
        decay = 0.0 if name in without_decay else decay
        groups[rate * depth_factors.get(name, 1.0), decay].append(parameter)
    params = [
        {"params": members, "lr": rate, "weight_decay": decay}
        for (rate, decay), members in groups.items()
    ]
    optimizer: torch.optim.Optimizer
    if solver.OPTIMIZER == "SGD":
        options = {"momentum": solver.MOMENTUM, "nesterov": solver.NESTEROV}
        optimizer = torch.optim.SGD(params, solver.BASE_LR, **options)
    else:
        optimizer = torch.optim.AdamW(params, solver.BASE_LR, fused=True)
    if solver.CLIP_GRADIENTS.ENABLED and solver.CLIP_GRADIENTS.CLIP_TYPE != "full_model":
        optimizer = maybe_add_gradient_clipping(cfg, optimizer)
    return optimizer


def _point_factors(model: nn.Module) -> dict[str, float]:
    """Factor of every parameter of layers that predict points."""
    return {
        f"{name}.{parameter}": module.learning_rate_factor
        for name, module in model.named_modules()
        if isinstance(module, PointLinear)
        for parameter, _ in module.named_parameters()
    }


def _depth_factors(model: nn.Module, decay: float) -> dict[str, float]:
    """Factor of every parameter of the bottom-up network by its depth, 1 for the last part.

    Parts are those of a `SplitBackbone`, otherwise the children (stem, res2, ..., res5).
    """
    modules = dict(model.named_modules())
    bottom_up = modules.get(_BOTTOM_UP, modules.get("backbone"))  # without a neck
    if decay == 1.0 or bottom_up is None:
        return {}
    if isinstance(bottom_up, SplitBackbone):
        parts = bottom_up.parts()
    else:
        parts = [[child] for child in bottom_up.children()]
    trained = [[p for module in part for p in module.parameters()] for part in parts]
    trained = [part for part in trained if part]
    depths = {id(p): depth for depth, part in enumerate(trained) for p in part}
    return {
        name: decay ** (len(trained) - 1 - depths[id(p)])
        for name, p in model.named_parameters()
        if id(p) in depths
    }


def _parameters_without_decay(model: nn.Module, kinds: Any) -> set[str]:
    """Names of parameters of these `kinds`.

    Kinds are norms, embeddings (learned proposals), position tables of transformers, and biases.
    """
    names = set()
    for prefix, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            is_embedding = isinstance(module, nn.Embedding) or name.startswith("expert_")
            kind = (
                "norm" if isinstance(module, _NORMS)
                else "embedding" if is_embedding
                else "position" if name in _POSITION_TABLES
                else "bias" if name.endswith("bias")
                else None
            )  # fmt: skip
            if kind in kinds:
                names.add(f"{prefix}.{name}" if prefix else name)
    return names


def clip_full_model(
    optimizer: torch.optim.Optimizer, max_norm: float, norm_type: float = 2.0
) -> torch.Tensor:
    """Scale all gradients by one factor so that their common norm is at most `max_norm`.

    With a gradient scaler, unscale the gradients first. An infinite `max_norm` changes nothing.

    Returns:
        The norm before clipping, a 0-d tensor on the device.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return nn.utils.clip_grad_norm_(parameters, max_norm, norm_type)
