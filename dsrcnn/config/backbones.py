"""Checks of the config keys of backbones and necks that depend on several keys."""

from itertools import pairwise

from detectron2.config import CfgNode
from detectron2.modeling import BACKBONE_REGISTRY

from ..errors import ConfigError
from . import rules
from .rules import check_table, check_value, one_of

_RESNET_BACKBONES = (
    "build_resnet_backbone",
    "build_resnet_fpn_backbone",
    "build_retinanet_resnet_fpn_backbone",
    "build_resnet_neck_backbone",
)
_WINDOWED_BACKBONE = "build_timm_vit_fpn_backbone"
_TIMM_LEVELS = ("res2", "res3", "res4", "res5")
_GROUPS_OF_GN = 32


def check_backbone(cfg: CfgNode, *, has_rpn: bool) -> None:
    """Check the keys of backbones and necks.

    Args:
        cfg: with the name of a registered backbone.
        has_rpn: whether the architecture reads ``MODEL.RPN.IN_FEATURES``.

    Raises:
        ConfigError: naming the key, the value found and the values expected.
    """
    name = cfg.MODEL.BACKBONE.NAME
    check_table(cfg, rules.MODEL, "MODEL")
    if cfg.MODEL.NECK.NAME != "FPN" and name == "build_resnet_fpn_backbone":
        raise ConfigError(
            f"MODEL.NECK.NAME is {cfg.MODEL.NECK.NAME!r}, but MODEL.BACKBONE.NAME "
            "build_resnet_fpn_backbone always has Detectron2's FPN. Write MODEL.BACKBONE.NAME "
            "build_resnet_neck_backbone."
        )
    _check_windows(cfg)
    channels = {"MODEL.FPN.OUT_CHANNELS": cfg.MODEL.FPN.NORM}
    if cfg.MODEL.SparseRCNN.DPG.ENABLED:
        channels["MODEL.SparseRCNN.HIDDEN_DIM"] = cfg.MODEL.SparseRCNN.DPG.NORM
    if name in _RESNET_BACKBONES:
        _check_resnet(cfg, has_rpn)
        for key in ("STEM_OUT_CHANNELS", "RES2_OUT_CHANNELS", "WIDTH_PER_GROUP"):
            channels[f"MODEL.RESNETS.{key}"] = cfg.MODEL.RESNETS.NORM
    if name == "build_timm_fpn_backbone":
        _pyramid(cfg, list(_TIMM_LEVELS), f"MODEL.TIMM {_TIMM_LEVELS}")
    for key, norm in channels.items():
        if norm == "GN" and (value := rules.value_of(cfg, key)) % _GROUPS_OF_GN:
            raise ConfigError(
                f"{key} is {value}, but GN needs a multiple of {_GROUPS_OF_GN}; write one, or "
                "another norm."
            )


def _check_windows(cfg: CfgNode) -> None:
    """Refuse windows of attention with the backbones that have none; users may add others."""
    name, window = cfg.MODEL.BACKBONE.NAME, cfg.MODEL.TIMM.WINDOW
    package = BACKBONE_REGISTRY.get(name).__module__.split(".")[0]
    if window and name != _WINDOWED_BACKBONE and package in ("dsrcnn", "detectron2"):
        raise ConfigError(
            f"MODEL.TIMM.WINDOW is {window}, but MODEL.BACKBONE.NAME {name} has no attention to "
            f"limit to windows. Write MODEL.TIMM.WINDOW 0, or MODEL.BACKBONE.NAME "
            f"{_WINDOWED_BACKBONE}."
        )


def _check_resnet(cfg: CfgNode, has_rpn: bool) -> None:
    node, key = cfg.MODEL.RESNETS, "MODEL.RESNETS"
    check_table(cfg, rules.RESNETS, key)
    if node.DEPTH < 50:  # basic blocks have neither groups nor dilation nor wider maps
        for name, value in (("RES2_OUT_CHANNELS", 64), ("NUM_GROUPS", 1), ("RES5_DILATION", 1)):
            if node[name] != value:
                raise ConfigError(
                    f"{key}.{name} is {node[name]}, but {key}.DEPTH {node.DEPTH} needs {value}. "
                    f"Write {key}.{name} {value}."
                )
    _check_deformable(node, key)
    if cfg.MODEL.BACKBONE.NAME == "build_resnet_backbone":  # without a pyramid
        return
    levels = list(node.OUT_FEATURES)
    names, stages = _pyramid(cfg, levels, f"{key}.OUT_FEATURES {tuple(levels)}")
    if cfg.MODEL.BACKBONE.NAME == "build_resnet_fpn_backbone" and names[-1] != "res5":
        raise ConfigError(
            f"MODEL.FPN.IN_FEATURES is {tuple(names)}, but build_resnet_fpn_backbone always pools "
            "p5, so it needs res5. Write res5 as well, or MODEL.BACKBONE.NAME "
            "build_resnet_neck_backbone."
        )
    if cfg.MODEL.BACKBONE.NAME != "build_retinanet_resnet_fpn_backbone":
        pyramid = [f"p{stage}" for stage in (*stages, stages[-1] + 1)]
        used = ["MODEL.ROI_HEADS.IN_FEATURES"]
        if has_rpn:
            used.append("MODEL.RPN.IN_FEATURES")
        for key in used:
            check_value(
                key,
                rules.value_of(cfg, key),
                rules.each(one_of(*pyramid), f"some of {', '.join(pyramid)}"),
            )


def _pyramid(cfg: CfgNode, levels: list[str], described: str) -> tuple[list[str], list[int]]:
    """Names and numbers of the maps that enter the pyramid, which must follow each other."""
    names = list(cfg.MODEL.FPN.IN_FEATURES)
    stages = [int(name.removeprefix("res")) for name in names if name in levels and name != "stem"]
    if not names or len(stages) < len(names) or any(b - a != 1 for a, b in pairwise(stages)):
        raise ConfigError(
            f"MODEL.FPN.IN_FEATURES is {tuple(names)}; write consecutive maps of {described}, such "
            "as ('res2', 'res3', 'res4', 'res5')."
        )
    return names, stages


def _check_deformable(node: CfgNode, key: str) -> None:
    used = [stage for stage, is_on in enumerate(node.DEFORM_ON_PER_STAGE) if is_on]
    if not used:
        return
    if node.DEPTH < 50:
        raise ConfigError(
            f"{key}.DEFORM_ON_PER_STAGE is {tuple(node.DEFORM_ON_PER_STAGE)}, but {key}.DEPTH "
            f"{node.DEPTH} has no deformable convolutions. Write four times False, or DEPTH 50."
        )
    channels = node.NUM_GROUPS * node.WIDTH_PER_GROUP * 2 ** used[0]
    if channels % node.DEFORM_NUM_GROUPS:
        raise ConfigError(
            f"{key}.DEFORM_NUM_GROUPS is {node.DEFORM_NUM_GROUPS}, which does not divide the "
            f"{channels} channels of res{used[0] + 2}. Write a divisor of them, such as 1."
        )
