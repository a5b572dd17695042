"""Whole detectors, registered by name in Detectron2's ``META_ARCH_REGISTRY``."""

from .adamixer import AdaMixer
from .asag import ASAG
from .sparse_rcnn import DynamicSparseRCNN, SparseRCNN

__all__ = ["ASAG", "AdaMixer", "DynamicSparseRCNN", "SparseRCNN"]
