"""Augmented training images with their boxes, as a detector sees them."""

from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from ..data import build_train_loader
from ..data.datasets.custom import require_class_names
from ..data.samplers import Draw, derive_seed
from ..errors import ConfigError
from ..visualization.draw import draw_boxes, evenly_spaced, hstack, vstack
from .images import as_bgr, save_image


def draw_augmented(cfg: CfgNode, output: str | Path, *, images: int = 4, times: int = 4) -> Path:
    """Write ``augmented.png``: a row for each image, `times` random augmentations each.

    Needs no weights. Returns the file.

    Raises:
        ConfigError: if one of the numbers is below 1.
        DataError: if the training set cannot be read or has no class names.
    """
    for key, count in (("images", images), ("times", times)):
        if count < 1:
            raise ConfigError(f"{key} is {count}; write a number of at least 1.")
    dataset: Any = build_train_loader(cfg).dataset
    names = require_class_names(cfg.DATASETS.TRAIN[0])
    rows = []
    for record in evenly_spaced(len(dataset), images):
        tiles, titles = [], []
        for number in range(times):
            mapped = dataset[Draw(record, derive_seed(record, number))]
            image, instances = as_bgr(mapped["image"], cfg.INPUT.FORMAT), mapped["instances"]
            boxes, labels = instances.gt_boxes.tensor.numpy(), instances.gt_classes.tolist()
            tiles.append(draw_boxes(image, boxes, labels, names))
            titles.append(f"{image.shape[1]} x {image.shape[0]}")
        rows.append(hstack(tiles, titles))
    return save_image(Path(output) / "augmented.png", vstack(rows))
