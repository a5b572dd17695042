"""Measurements of speed and memory; run ``python -m benchmarks --help`` in a clone."""

import dsrcnn  # noqa: F401  (bridges Detectron2 before a benchmark imports it)
