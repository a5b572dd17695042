"""Configs that are ready to use: data sets registered, classes counted, device chosen, checked."""

from collections.abc import Sequence
from pathlib import Path

from detectron2.config import CfgNode

from ..config import check_config, choose_device, read_cfg
from ..data.datasets import resolve_num_classes, use_custom_data
from ..modeling.backbone.timm_backbone import pixel_statistics

__all__ = ["load_cfg"]


def load_cfg(path_or_name: str | Path, opts: Sequence[object] = ()) -> CfgNode:
    """A config that is ready to build a model, a trainer or a predictor.

    Args:
        path_or_name: YAML file or shipped name, such as ``coco/sparse_rcnn_R50_300pro_3x``.
        opts: ``KEY, VALUE, KEY, VALUE ...``.

    Returns:
        The config, not frozen. The data set of ``DATASETS.CUSTOM`` is registered, ``NUM_CLASSES 0``
        resolved, the device is the CPU where CUDA is absent, and pixels are standardized as a
        network of timm wants them.

    Raises:
        ConfigError: for a file that does not exist, an unknown key, or values that cannot work.
        DataError: if the annotations of ``DATASETS.CUSTOM`` cannot be read.
    """
    cfg = read_cfg(path_or_name, opts)
    use_custom_data(cfg)
    resolve_num_classes(cfg)
    choose_device(cfg)
    use_pixel_statistics(cfg)
    check_config(cfg)
    return cfg


def use_pixel_statistics(cfg: CfgNode) -> None:
    """Where the backbone is timm's: pixels as its weights know them, in place."""
    if "timm" in cfg.MODEL.BACKBONE.NAME and cfg.MODEL.TIMM.PIXEL_STATISTICS:
        cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = pixel_statistics(cfg.MODEL.TIMM.NAME)
        cfg.INPUT.FORMAT = "RGB"
