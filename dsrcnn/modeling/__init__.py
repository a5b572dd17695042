"""Networks, matching and losses; importing it registers the meta-architectures."""

from .meta_arch import SparseRCNN

__all__ = ["SparseRCNN"]
