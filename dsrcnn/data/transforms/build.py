"""Augmentations from ``INPUT`` and ``INPUT.AUG``."""

from detectron2.config import CfgNode
from detectron2.data import transforms as T

from .albumentations import AlbumentationsAdapter
from .geometric import RandomWarp
from .photometric import RandomBlur, RandomHSV, RandomNoise

__all__ = ["build_albumentations", "build_augmentations", "build_resizing"]


def build_augmentations(cfg: CfgNode) -> list[T.Augmentation]:
    """What happens to an image before it is resized for training: flips, colours, warp."""
    node, aug = cfg.INPUT, cfg.INPUT.AUG
    found: list[T.Augmentation] = []
    if node.RANDOM_FLIP != "none":
        vertical = node.RANDOM_FLIP == "vertical"
        found.append(T.RandomFlip(horizontal=not vertical, vertical=vertical))
    if aug.VERTICAL_FLIP:
        found.append(T.RandomFlip(aug.VERTICAL_FLIP, horizontal=False, vertical=True))
    warp = RandomWarp(
        degrees=aug.WARP.DEGREES,
        scale=tuple(aug.WARP.SCALE),
        translate=aug.WARP.TRANSLATE,
        shear=aug.WARP.SHEAR,
        perspective=aug.WARP.PERSPECTIVE,
        fill=cfg.MODEL.PIXEL_MEAN,  # nothing, once standardized
    )
    for augmentation, probability in (
        (RandomHSV(aug.HSV.STRENGTHS, node.FORMAT), aug.HSV.PROB),
        (RandomBlur(aug.BLUR.MAX_SIZE), aug.BLUR.PROB),
        (RandomNoise(aug.NOISE.MAX_SIGMA), aug.NOISE.PROB),
        (warp, aug.WARP.PROB),
    ):
        if probability:
            found.append(T.RandomApply(augmentation, probability))
    return found


def build_albumentations(cfg: CfgNode) -> AlbumentationsAdapter | None:
    """The transforms of ``INPUT.AUG.ALBUMENTATIONS``; None if it is empty.

    Raises:
        ConfigError: if they cannot be built.
    """
    node = cfg.INPUT
    if not node.AUG.ALBUMENTATIONS:
        return None
    return AlbumentationsAdapter(
        node.AUG.ALBUMENTATIONS, image_format=node.FORMAT, min_visible=node.AUG.MIN_VISIBLE
    )


def build_resizing(cfg: CfgNode) -> list[T.Augmentation]:
    """How images get the size they are trained at: the official multi-scale, or scale jitter."""
    node, jitter = cfg.INPUT, cfg.INPUT.AUG.SCALE_JITTER
    if not jitter.ENABLED:
        sizes = (node.MIN_SIZE_TRAIN, node.MAX_SIZE_TRAIN, node.MIN_SIZE_TRAIN_SAMPLING)
        return [T.ResizeShortestEdge(*sizes)]
    low, high = jitter.RANGE
    # Not padded: a batch is, and boxes are relative to the image alone.
    return [
        T.ResizeScale(low, high, jitter.SIZE, jitter.SIZE),
        T.FixedSizeCrop((jitter.SIZE, jitter.SIZE), pad=False),
    ]
