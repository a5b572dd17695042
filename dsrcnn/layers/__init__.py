"""Blocks without any knowledge of detectors."""

from .blocks import initialize_xavier, linear_norm_act, prior_bias
from .dynamic_conv import DynamicConv

__all__ = ["DynamicConv", "initialize_xavier", "linear_norm_act", "prior_bias"]
