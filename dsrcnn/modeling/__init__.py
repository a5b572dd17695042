"""Networks, matching and losses; importing it registers the meta-architectures."""

from . import backbone, roi_heads  # noqa: F401  (registers backbones and heads)
from .meta_arch import ASAG, AdaMixer, DynamicSparseRCNN, SparseRCNN

__all__ = ["ASAG", "AdaMixer", "DynamicSparseRCNN", "SparseRCNN"]
