"""Whole detectors, registered by name in Detectron2's ``META_ARCH_REGISTRY``."""

from .adamixer import AdaMixer
from .sparse_rcnn import DynamicSparseRCNN, SparseRCNN

__all__ = ["AdaMixer", "DynamicSparseRCNN", "SparseRCNN"]
