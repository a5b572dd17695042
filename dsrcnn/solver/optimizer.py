"""AdamW with a factor for the backbone, and one clipping for all gradients (Sparse R-CNN)."""

from collections import defaultdict

import torch
from detectron2.config import CfgNode
from detectron2.solver.build import maybe_add_gradient_clipping
from torch import nn

__all__ = ["build_optimizer", "clip_full_model"]


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW or SGD over all trainable parameters.

    The learning rate of parameters under ``backbone`` is multiplied by
    ``SOLVER.BACKBONE_MULTIPLIER``; weight decay applies to everything, as officially. Parameters of
    equal settings share one group, which makes a step several times faster than one group each and
    changes no number. AdamW runs fused: one pass over memory instead of one per operation.

    Clipping of type ``full_model`` is not done here but between unscaling and step, by the training
    loop (`clip_full_model`); the types of Detectron2 are applied by its own wrapper.
    """
    solver = cfg.SOLVER
    groups: dict[float, list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            factor = solver.BACKBONE_MULTIPLIER if "backbone" in name else 1.0
            groups[solver.BASE_LR * factor].append(parameter)
    params = [{"params": members, "lr": lr} for lr, members in groups.items()]
    optimizer: torch.optim.Optimizer
    if solver.OPTIMIZER == "SGD":
        optimizer = torch.optim.SGD(
            params, solver.BASE_LR, momentum=solver.MOMENTUM, weight_decay=solver.WEIGHT_DECAY
        )
    else:
        optimizer = torch.optim.AdamW(
            params, solver.BASE_LR, weight_decay=solver.WEIGHT_DECAY, fused=True
        )
    if solver.CLIP_GRADIENTS.ENABLED and solver.CLIP_GRADIENTS.CLIP_TYPE != "full_model":
        optimizer = maybe_add_gradient_clipping(cfg, optimizer)
    return optimizer


def clip_full_model(
    optimizer: torch.optim.Optimizer, max_norm: float, norm_type: float = 2.0
) -> torch.Tensor:
    """Scale all gradients together so that their common norm is at most `max_norm`.

    Gradients must be unscaled before under a gradient scaler.

    Returns:
        The norm before clipping, a tensor on the device.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return nn.utils.clip_grad_norm_(parameters, max_norm, norm_type)
