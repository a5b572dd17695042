"""AdamW with factors for the backbone, and one clipping for all gradients (Sparse R-CNN)."""

from collections import defaultdict
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver.build import maybe_add_gradient_clipping
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["build_optimizer", "clip_full_model"]

_NORMS = (_BatchNorm, nn.LayerNorm, nn.GroupNorm)


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW or SGD over all trainable parameters.

    The learning rate of parameters under ``backbone`` is multiplied by
    ``SOLVER.BACKBONE_MULTIPLIER`` (that of its neck by ``SOLVER.NECK_MULTIPLIER`` if set) and, part
    by part below the last, by ``SOLVER.LAYER_DECAY``.
    Weight decay applies to everything, as officially, but for what ``SOLVER.NO_DECAY`` names.
    Biases have Detectron2's ``BIAS_LR_FACTOR`` and ``WEIGHT_DECAY_BIAS``.
    Parameters of equal settings share one group, which makes a step several times faster than one
    group each and changes no number. AdamW runs fused: one pass over memory instead of one per
    operation.

    Clipping of type ``full_model`` is not done here but between unscaling and step, by the training
    loop (`clip_full_model`); the types of Detectron2 are applied by its own wrapper.
    """
    solver = cfg.SOLVER
    factors = _layer_factors(model, solver.LAYER_DECAY)
    without_decay = _parameters_without_decay(model, solver.NO_DECAY)
    groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        rate = solver.BASE_LR * _factor(solver, model, name)
        decay = solver.WEIGHT_DECAY
        if name.endswith("bias"):  # Detectron2's keys; they change nothing by default
            rate *= solver.BIAS_LR_FACTOR
            decay = decay if solver.WEIGHT_DECAY_BIAS is None else solver.WEIGHT_DECAY_BIAS
        decay = 0.0 if name in without_decay else decay
        groups[rate * factors.get(name, 1.0), decay].append(parameter)
    params = [
        {"params": members, "lr": rate, "weight_decay": decay}
        for (rate, decay), members in groups.items()
    ]
    optimizer: torch.optim.Optimizer
    if solver.OPTIMIZER == "SGD":
        optimizer = torch.optim.SGD(params, solver.BASE_LR, momentum=solver.MOMENTUM)
    else:
        optimizer = torch.optim.AdamW(params, solver.BASE_LR, fused=True)
    if solver.CLIP_GRADIENTS.ENABLED and solver.CLIP_GRADIENTS.CLIP_TYPE != "full_model":
        optimizer = maybe_add_gradient_clipping(cfg, optimizer)
    return optimizer


def _factor(solver: CfgNode, model: nn.Module, name: str) -> float:
    """Learning rate factor of a parameter by where it is: backbone, its neck, or elsewhere."""
    if "backbone" not in name:
        return 1.0
    has_neck = hasattr(getattr(model, "backbone", None), "bottom_up")
    in_neck = has_neck and not name.startswith("backbone.bottom_up.")
    if in_neck and solver.NECK_MULTIPLIER is not None:
        return float(solver.NECK_MULTIPLIER)
    return float(solver.BACKBONE_MULTIPLIER)


def _layer_factors(model: nn.Module, decay: float) -> dict[str, float]:
    """Factor of every parameter of the backbone's bottom-up network, by its depth.

    Depth counts the parts it is built of (stem, res2, ..., res5); the last one has the factor 1.
    """
    bottom_up = getattr(getattr(model, "backbone", None), "bottom_up", None)
    if decay == 1.0 or bottom_up is None:
        return {}
    # A network that is not built of five children says itself what its parts are.
    cut = getattr(bottom_up, "parts", lambda: [[child] for child in bottom_up.children()])
    parts = [[p for unit in part for p in unit.parameters()] for part in cut()]
    parts = [part for part in parts if part]
    depths = {id(p): depth for depth, part in enumerate(parts) for p in part}
    return {
        name: decay ** (len(parts) - 1 - depths[id(p)])
        for name, p in model.named_parameters()
        if id(p) in depths
    }


def _parameters_without_decay(model: nn.Module, kinds: Any) -> set[str]:
    """Names of the parameters that are a norm's, a bias, or an embedding (learned proposals)."""
    names = set()
    for prefix, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            is_embedding = isinstance(module, nn.Embedding) or name.startswith("expert_")
            kind = (
                "norm" if isinstance(module, _NORMS)
                else "embedding" if is_embedding
                else "bias" if name.endswith("bias")
                else None
            )  # fmt: skip
            if kind in kinds:
                names.add(f"{prefix}.{name}" if prefix else name)
    return names


def clip_full_model(
    optimizer: torch.optim.Optimizer, max_norm: float, norm_type: float = 2.0
) -> torch.Tensor:
    """Scale all gradients together so that their common norm is at most `max_norm`.

    Gradients must be unscaled before under a gradient scaler.

    Args:
        optimizer: over the parameters.
        max_norm: infinity leaves the gradients as they are.
        norm_type: order of the norm.

    Returns:
        The norm before clipping, a tensor on the device.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return nn.utils.clip_grad_norm_(parameters, max_norm, norm_type)
