"""Networks, matching and losses; importing it registers the meta-architectures."""

from . import backbone  # noqa: F401  (registers backbones)
from .meta_arch import DynamicSparseRCNN, SparseRCNN

__all__ = ["DynamicSparseRCNN", "SparseRCNN"]
