"""Freezing of parts of a model, and of the statistics of its norms."""

import difflib
from collections.abc import Sequence
from functools import partial

from detectron2.layers import FrozenBatchNorm2d
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import ConfigError
from ..layers.norm import RunningNorm
from .backbone.timm_backbone import freeze_norms_of_timm


def use_stored_statistics(model: nn.Module) -> None:
    """Let the backbone's batch norms use stored statistics in training; factors stay trainable.

    As in the official code of AdaMixer and DETR-like detectors of MMDetection (``norm_eval``). The
    norms of a pyramid network on top, which starts without statistics, train as usual.

    Raises:
        ConfigError: if the backbone has no batch norms whose factors are trained.
    """
    backbone = model.get_submodule("backbone")
    body = getattr(backbone, "bottom_up", backbone)
    norms = [m for m in body.modules() if isinstance(m, _BatchNorm)]
    if not norms:
        raise ConfigError(
            "MODEL.BACKBONE.NORM_EVAL is True, but the backbone has no batch norms with trained "
            "factors. Write MODEL.RESNETS.NORM BN (MODEL.TIMM.NORM '' for a network of timm that "
            "has some), or MODEL.BACKBONE.NORM_EVAL False."
        )
    for norm in norms:
        # In place of the method, so that the class, by which others know norms, stays.
        norm.train = partial(_stay_in_evaluation, norm)  # type: ignore[assignment, method-assign]
        norm.eval()


def _stay_in_evaluation(norm: nn.Module, mode: bool = True) -> nn.Module:
    return type(norm).train(norm, False)


def freeze_modules(model: nn.Module, names: Sequence[str]) -> None:
    """Freeze modules in place: no gradients, and batch norms always use stored statistics.

    Names are those of `model`'s modules, such as ``backbone`` or ``head.head_series.0``.

    Raises:
        ConfigError: if there is no such module, or nothing is left to train.
    """
    for name in names:
        modules = dict(model.named_modules())
        if name not in modules or not name:
            close = difflib.get_close_matches(name, modules, n=3, cutoff=0.4)
            raise ConfigError(
                f"MODEL.FREEZE names {name!r}, which is no module of the model. "
                f"Names are such as {', '.join(close or list(modules)[1:4])}."
            )
        frozen = FrozenBatchNorm2d.convert_frozen_batchnorm(freeze_norms_of_timm(modules[name]))
        if frozen is not modules[name]:  # the module is a norm
            parent, _, child = name.rpartition(".")
            setattr(modules[parent], child, frozen)
        frozen.requires_grad_(False)
        for norm in (m for m in frozen.modules() if isinstance(m, RunningNorm)):
            norm.frozen = True
    if names and not any(p.requires_grad for p in model.parameters()):
        raise ConfigError(f"MODEL.FREEZE {tuple(names)} leaves nothing to train; name fewer.")
