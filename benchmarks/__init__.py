"""Speed and memory of two variants, measured in turn in one run."""

from benchmarks.speed import Variant, compare

__all__ = ["Variant", "compare"]
