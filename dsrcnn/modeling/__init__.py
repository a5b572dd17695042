"""Networks, matching and losses; importing it registers the meta-architectures."""

from .meta_arch import DynamicSparseRCNN, SparseRCNN

__all__ = ["DynamicSparseRCNN", "SparseRCNN"]
