"""Whole detectors, registered by name in Detectron2's ``META_ARCH_REGISTRY``."""

from .sparse_rcnn import SparseRCNN

__all__ = ["SparseRCNN"]
