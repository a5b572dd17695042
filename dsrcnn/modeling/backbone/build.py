"""Backbones by name, for ``MODEL.BACKBONE.NAME``."""

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone import FPN
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.resnet import build_resnet_backbone

from .necks import PAFPN, BiFPN, ChannelMapper
from .timm_backbone import TimmBackbone

__all__ = [
    "build_neck",
    "build_resnet_neck_backbone",
    "build_timm_backbone",
    "build_timm_fpn_backbone",
]


@BACKBONE_REGISTRY.register()
def build_timm_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """A network of timm by ``MODEL.TIMM``: feature maps ``res2`` to ``res5``.

    Its own weights are the start where ``MODEL.WEIGHTS`` is empty.
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
    """A network of timm with the neck ``MODEL.NECK.NAME``."""
    return build_neck(cfg, build_timm_backbone(cfg, input_shape))


@BACKBONE_REGISTRY.register()
def build_resnet_neck_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Detectron2's ResNet with the neck ``MODEL.NECK.NAME``."""
    return build_neck(cfg, build_resnet_backbone(cfg, input_shape))


def build_neck(cfg: CfgNode, bottom_up: Backbone) -> Backbone:
    """Attach ``MODEL.NECK`` to a network; ``MODEL.FPN`` has channels, norm and input maps."""
    node = cfg.MODEL.FPN
    common = (bottom_up, list(node.IN_FEATURES), node.OUT_CHANNELS, node.NORM)
    name = cfg.MODEL.NECK.NAME
    if name == "PAFPN":
        return PAFPN(*common)
    if name == "BiFPN":
        return BiFPN(*common, rounds=cfg.MODEL.NECK.ROUNDS)
    if name == "ChannelMapper":
        return ChannelMapper(*common, shared_norm=cfg.MODEL.NECK.SHARED_NORM)
    return FPN(*common, top_block=LastLevelMaxPool(), fuse_type=node.FUSE_TYPE)
