"""Checks of what a config says about augmentation."""

from detectron2.config import CfgNode

from ..errors import ConfigError

__all__ = ["check_augmentation"]


def check_augmentation(cfg: CfgNode) -> None:
    """Reject values of ``INPUT.AUG`` that cannot work.

    Raises:
        ConfigError: naming key, value found and value expected.
    """
    node = cfg.INPUT.AUG
    shares = {name: node[name] for name in ("VERTICAL_FLIP", "MIN_VISIBLE", "PLAIN_END")}
    parts = {name: part for name, part in node.items() if isinstance(part, CfgNode)}
    shares |= {f"{name}.PROB": part.PROB for name, part in parts.items() if "PROB" in part}
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise ConfigError(f"INPUT.AUG.{name} is {value}; write a number from 0 to 1.")
    if node.BLUR.MAX_SIZE < 3:
        raise ConfigError(f"INPUT.AUG.BLUR.MAX_SIZE is {node.BLUR.MAX_SIZE}; write 3 or more.")
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
        ("SCALE_JITTER.RANGE", node.SCALE_JITTER.RANGE),
    ):
        if len(pair) != 2 or not 0 < pair[0] <= pair[1]:
            raise ConfigError(
                f"INPUT.AUG.{name} is {tuple(pair)}; write the smallest and the largest factor, "
                "both above 0."
            )
