"""Checks of what a config says about augmentation."""

from detectron2.config import CfgNode

from ..errors import ConfigError
from .validate_training import expect_one_of

__all__ = ["check_augmentation"]


def check_augmentation(cfg: CfgNode) -> None:
    """Reject values of ``INPUT.AUG`` that cannot work.

    Raises:
        ConfigError: naming key, value found and value expected.
    """
    node = cfg.INPUT.AUG
    shares = {name: node[name] for name in ("VERTICAL_FLIP", "MIN_VISIBLE", "PLAIN_END")}
    shares["COPY_PASTE.MAX_COVERED"] = node.COPY_PASTE.MAX_COVERED
    parts = {name: part for name, part in node.items() if isinstance(part, CfgNode)}
    shares |= {f"{name}.PROB": part.PROB for name, part in parts.items() if "PROB" in part}
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise ConfigError(f"INPUT.AUG.{name} is {value}; write a number from 0 to 1.")
    if node.BLUR.MAX_SIZE < 3:
        raise ConfigError(f"INPUT.AUG.BLUR.MAX_SIZE is {node.BLUR.MAX_SIZE}; write 3 or more.")
    expect_one_of("INPUT.RANDOM_FLIP", cfg.INPUT.RANDOM_FLIP, "none", "horizontal", "vertical")
    for name, value, least in (
        ("PAD_TO", cfg.INPUT.PAD_TO, 0),
        ("AUG.MOSAIC.SIZE", node.MOSAIC.SIZE, 32),
        ("AUG.SCALE_JITTER.SIZE", node.SCALE_JITTER.SIZE, 32),
        ("AUG.COPY_PASTE.OBJECTS", node.COPY_PASTE.OBJECTS, 1),
        ("AUG.NOISE.MAX_SIGMA", node.NOISE.MAX_SIGMA, 1),
    ):
        if value < least:
            raise ConfigError(f"INPUT.{name} is {value}; write a number of at least {least}.")
    combining = [k for k in ("MOSAIC", "MIXUP", "COPY_PASTE") if node[k].PROB]
    combining += ["ALBUMENTATIONS"] if node.ALBUMENTATIONS else []
    if cfg.MODEL.MASK_ON and combining:
        raise ConfigError(
            f"INPUT.AUG.{combining[0]} moves boxes but no masks, and MODEL.MASK_ON is True. Leave "
            "it out, or write MODEL.MASK_ON False."
        )
    if not node.MIXUP.ALPHA > 0:
        raise ConfigError(f"INPUT.AUG.MIXUP.ALPHA is {node.MIXUP.ALPHA}; write a number above 0.")
    if not 0 <= node.WARP.PERSPECTIVE < 0.5:
        raise ConfigError(
            f"INPUT.AUG.WARP.PERSPECTIVE is {node.WARP.PERSPECTIVE}; write a share from 0 to below "
            "0.5."
        )
    if len(node.HSV.STRENGTHS) != 3:
        raise ConfigError(
            f"INPUT.AUG.HSV.STRENGTHS has {len(node.HSV.STRENGTHS)} numbers; write one each for "
            "hue, saturation and value."
        )
    for name, pair in (
        ("WARP.SCALE", node.WARP.SCALE),
        ("MOSAIC.SCALE", node.MOSAIC.SCALE),
        ("SCALE_JITTER.RANGE", node.SCALE_JITTER.RANGE),
    ):
        if len(pair) != 2 or not 0 < pair[0] <= pair[1]:
            raise ConfigError(
                f"INPUT.AUG.{name} is {tuple(pair)}; write the smallest and the largest factor, "
                "both above 0."
            )
