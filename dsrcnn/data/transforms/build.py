"""Augmentations from ``INPUT`` and ``INPUT.AUG``, in the order in which the mapper applies them."""

from detectron2.config import CfgNode
from detectron2.data import transforms as T

from .albumentations import AlbumentationsAdapter
from .geometric import Crop, RandomWarp, Resize
from .photometric import RandomBlur, RandomHSV, RandomNoise

_SIZES_BEFORE_CROP = (400, 500, 600)  # short sides, fixed in DETR and Sparse R-CNN
_MAX_SIZE_BEFORE_CROP = 6000  # a strip of 200:1 would take hundreds of megabytes
JITTER_RANGE = (0.1, 2.0)  # of large-scale jitter (arXiv 2012.07177)


def build_albumentations(cfg: CfgNode) -> AlbumentationsAdapter | None:
    """Build the transforms of ``INPUT.AUG.ALBUMENTATIONS``; None if there are none.

    Raises:
        ConfigError: if a transform cannot be built.
    """
    image_format, aug = cfg.INPUT.FORMAT, cfg.INPUT.AUG
    options = {"image_format": image_format, "min_visible": aug.MIN_VISIBLE}
    return AlbumentationsAdapter(aug.ALBUMENTATIONS, **options) if aug.ALBUMENTATIONS else None


def build_augmentations(cfg: CfgNode) -> list[T.Augmentation]:
    """Build flips, color changes and the warp, which come before resizing."""
    node, aug = cfg.INPUT, cfg.INPUT.AUG
    augmentations: list[T.Augmentation] = []
    if node.RANDOM_FLIP != "none":
        vertical = node.RANDOM_FLIP == "vertical"
        augmentations.append(T.RandomFlip(horizontal=not vertical, vertical=vertical))
    if aug.VERTICAL_FLIP:
        augmentations.append(T.RandomFlip(aug.VERTICAL_FLIP, horizontal=False, vertical=True))
    warp = RandomWarp(
        degrees=aug.WARP.DEGREES,
        scale=tuple(aug.WARP.SCALE),
        translate=aug.WARP.TRANSLATE,
        shear=aug.WARP.SHEAR,
        perspective=aug.WARP.PERSPECTIVE,
        fill=cfg.MODEL.PIXEL_MEAN,  # 0 after normalization
    )
    optional = [(RandomHSV(node.FORMAT), aug.HSV.PROB), (RandomBlur(), aug.BLUR.PROB)]
    optional += [(RandomNoise(), aug.NOISE.PROB), (warp, aug.WARP.PROB)]
    return augmentations + [T.RandomApply(a, prob) for a, prob in optional if prob]


def build_cropping(cfg: CfgNode) -> list[T.Augmentation]:
    """Build the resize to a small size, the crop of ``INPUT.CROP`` and the resize after it."""
    sizes = T.ResizeShortestEdge(_SIZES_BEFORE_CROP, _MAX_SIZE_BEFORE_CROP, "choice")
    crop = Crop(cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE)
    return [Resize(sizes, cfg.INPUT.OPENCV), crop, *build_resizing(cfg)]


def build_resizing(cfg: CfgNode) -> list[T.Augmentation]:
    """Build the official multi-scale resize, or large-scale jitter."""
    node, side = cfg.INPUT, cfg.INPUT.AUG.SCALE_JITTER.SIZE
    sizes = (node.MIN_SIZE_TRAIN, node.MAX_SIZE_TRAIN, node.MIN_SIZE_TRAIN_SAMPLING)
    chosen = T.ResizeScale(*JITTER_RANGE, side, side) if side else T.ResizeShortestEdge(*sizes)
    resize = Resize(chosen, node.OPENCV)
    # Batches are padded later, so a small image is not padded to the size of the crop.
    return [resize, T.FixedSizeCrop((side, side), pad=False)] if side else [resize]
