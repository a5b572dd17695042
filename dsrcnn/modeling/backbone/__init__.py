"""Backbones beside Detectron2's: networks of timm, and necks; importing it registers them."""

from ...layers.deform_conv import provide_deform_conv
from . import build  # noqa: F401  (registers backbones)

provide_deform_conv()
