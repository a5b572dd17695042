"""Networks, matching and losses; importing it registers architectures, backbones and ROI heads."""

from . import backbone, roi_heads  # noqa: F401
from .meta_arch.adamixer import AdaMixer
from .meta_arch.asag import ASAG
from .meta_arch.deformable_detr import DeformableDETR
from .meta_arch.sparse_rcnn import DynamicSparseRCNN, SparseRCNN

__all__ = ["ASAG", "AdaMixer", "DeformableDETR", "DynamicSparseRCNN", "SparseRCNN"]
