"""Speed and memory of two variants, measured in turn in one run."""

from .speed import Variant, compare

__all__ = ["Variant", "compare"]
