"""Feature extractors beyond Detectron2's: timm's networks, and necks for any of them."""

from ...layers.deform_conv import provide_deform_conv
from .build import build_resnet_neck_backbone, build_timm_backbone, build_timm_fpn_backbone

provide_deform_conv()

__all__ = ["build_resnet_neck_backbone", "build_timm_backbone", "build_timm_fpn_backbone"]
