"""Config keys, their checks, and reading of configs."""

from .defaults import add_dsrcnn_config
from .load import config_step, load_cfg, read_cfg, shipped_configs
from .validate import check_config, check_model, choose_device

__all__ = [
    "add_dsrcnn_config",
    "check_config",
    "check_model",
    "choose_device",
    "config_step",
    "load_cfg",
    "read_cfg",
    "shipped_configs",
]
