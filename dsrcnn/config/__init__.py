"""Every configuration key, the checks on them, and the only reader of YAML."""

from .defaults import add_dsrcnn_config
from .load import read_cfg, shipped_configs
from .validate import CASCADES, SPARSE_DETECTORS, check_config, check_model, choose_device

__all__ = [
    "CASCADES",
    "SPARSE_DETECTORS",
    "add_dsrcnn_config",
    "check_config",
    "check_model",
    "choose_device",
    "read_cfg",
    "shipped_configs",
]
