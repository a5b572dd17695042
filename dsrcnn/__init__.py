"""Sparse detectors with dynamic parts for Detectron2.

Importing this package makes Detectron2 0.6 work on current torch (`dsrcnn.compat`), then registers
every component, so ``MODEL.META_ARCHITECTURE: SparseRCNN`` works in any Detectron2 program.
"""

from typing import TYPE_CHECKING, Any

from .compat import ensure_compatible

ensure_compatible()  # before anything below imports Detectron2

from . import data, modeling  # noqa: E402, F401  (registers datasets and meta-architectures)
from .config.defaults import add_dsrcnn_config  # noqa: E402
from .config.load import load_cfg  # noqa: E402
from .version import __version__  # noqa: E402

if TYPE_CHECKING:
    from .inference import Detector, ExportedDetector, Result, load, load_exported

_OF_INFERENCE = ("Detector", "ExportedDetector", "Result", "load", "load_exported")

__all__ = [
    "Detector",
    "ExportedDetector",
    "Result",
    "__version__",
    "add_dsrcnn_config",
    "load",
    "load_cfg",
    "load_exported",
]


def __getattr__(name: str) -> Any:
    """Import what predicts when it is used first; training needs none of it."""
    if name in _OF_INFERENCE:
        from . import inference

        return getattr(inference, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
