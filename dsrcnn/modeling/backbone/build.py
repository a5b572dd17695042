"""Backbones by name, for ``MODEL.BACKBONE.NAME``."""

import logging
from collections.abc import Callable
from functools import partial

import numpy as np
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone import FPN
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.resnet import build_resnet_backbone

from ...config.load import config_step
from ...errors import ConfigError
from .necks import PAFPN, BiFPN, ChannelMapper, InputProjection
from .timm_backbone import TimmBackbone, pixel_statistics
from .vit_backbone import SimpleFeaturePyramid, VisionTransformer

_LOGGER = logging.getLogger(__name__)
# Means and standard deviations of Detectron2's default and of Base-SparseRCNN.yaml.
_COMMON = {
    "PIXEL_MEAN": ([103.53, 116.28, 123.675], [123.675, 116.28, 103.53]),
    "PIXEL_STD": ([1.0, 1.0, 1.0], [58.395, 57.12, 57.375]),
}


@BACKBONE_REGISTRY.register()
def build_timm_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Build the network ``MODEL.TIMM`` with feature maps ``res2`` to ``res5``.

    It starts from timm's weights only if ``MODEL.WEIGHTS`` is empty.
    """
    node = cfg.MODEL.TIMM
    starts_from_file = bool(cfg.MODEL.WEIGHTS)
    return TimmBackbone(
        node.NAME,
        pretrained=node.PRETRAINED and not starts_from_file,
        weights="" if starts_from_file else node.WEIGHTS,
        norm=node.NORM,
        drop_path=node.DROP_PATH,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
    )


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Build a network of timm with the neck ``MODEL.NECK.NAME``."""
    return build_neck(cfg, build_timm_backbone(cfg, input_shape))


@BACKBONE_REGISTRY.register()
def build_timm_vit_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Build a plain vision transformer of timm with the simple pyramid of ViTDet.

    It starts from weights only if ``MODEL.WEIGHTS`` is empty.

    Raises:
        ConfigError: if a key is set that it has no use for.
    """
    node, model = cfg.MODEL.TIMM, cfg.MODEL
    unused = {"MODEL.TIMM.NORM": node.NORM, "MODEL.FPN.NORM": model.FPN.NORM}
    for key, value in unused.items():
        if value:
            raise ConfigError(
                f"{key} is {value!r}, but build_timm_vit_fpn_backbone has layer norms only. Write "
                f'{key} "".'
            )
    if model.NECK.NAME != "FPN":
        raise ConfigError(
            f"MODEL.NECK.NAME is {model.NECK.NAME!r}, but build_timm_vit_fpn_backbone has a neck "
            "of its own. Leave the key out."
        )
    bottom_up = VisionTransformer(
        node.NAME,
        pretrained=node.PRETRAINED and not model.WEIGHTS,
        weights="" if model.WEIGHTS else node.WEIGHTS,
        drop_path=node.DROP_PATH,
        window=node.WINDOW,
        freeze_at=model.BACKBONE.FREEZE_AT,
    )
    return SimpleFeaturePyramid(bottom_up, model.FPN.OUT_CHANNELS)


@BACKBONE_REGISTRY.register()
def build_resnet_neck_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Build Detectron2's ResNet with the neck ``MODEL.NECK.NAME``."""
    return build_neck(cfg, build_resnet_backbone(cfg, input_shape))


def build_neck(cfg: CfgNode, bottom_up: Backbone) -> Backbone:
    """Attach ``MODEL.NECK`` to a network; ``MODEL.FPN`` has channels, norm and input maps."""
    node = cfg.MODEL.FPN
    top = LastLevelMaxPool()
    # Detectron2's pools p5, whatever the last map is.
    top.in_feature = str(node.IN_FEATURES[-1]).replace("res", "p")
    necks: dict[str, Callable[..., Backbone]] = {
        "FPN": partial(FPN, top_block=top, fuse_type=node.FUSE_TYPE),
        "PAFPN": PAFPN,
        "BiFPN": BiFPN,
        "InputProjection": InputProjection,
        "ChannelMapper": partial(ChannelMapper, shared_norm=cfg.MODEL.NECK.SHARED_NORM),
    }
    neck = necks[cfg.MODEL.NECK.NAME]
    return neck(bottom_up, list(node.IN_FEATURES), node.OUT_CHANNELS, node.NORM)


@config_step
def use_pixel_statistics(cfg: CfgNode) -> None:
    """Standardize pixels as the weights of a timm backbone expect, in place.

    Statistics of one's own stay, with a note; the order of channels is RGB.
    """
    if cfg.MODEL.BACKBONE.NAME not in BACKBONE_REGISTRY:
        return  # an error of `check_config`
    builder = BACKBONE_REGISTRY.get(cfg.MODEL.BACKBONE.NAME)
    timm = (build_timm_backbone, build_timm_fpn_backbone, build_timm_vit_fpn_backbone)
    if builder not in timm:
        return
    cfg.INPUT.FORMAT = "RGB"
    statistics = zip(_COMMON.items(), pixel_statistics(cfg.MODEL.TIMM.NAME), strict=True)
    for (key, common), value in statistics:
        if list(cfg.MODEL[key]) in common:
            cfg.MODEL[key] = value
        elif not np.allclose(cfg.MODEL[key], value):
            _LOGGER.warning(
                "MODEL.%s is %s; MODEL.TIMM.NAME %s was trained with %s.",
                *(key, list(cfg.MODEL[key]), cfg.MODEL.TIMM.NAME, value),
            )
