"""Training images with their boxes, as a detector sees them."""

from pathlib import Path
from typing import Any

import cv2
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from ..data import build_train_loader
from ..data.samplers import Draw, mixed_seed
from ..visualization import draw_boxes, one_below_the_other, side_by_side
from ..visualization.draw import spread
from .images import as_bgr

__all__ = ["draw_augmented"]


def draw_augmented(cfg: CfgNode, output: str | Path, *, images: int = 4, times: int = 4) -> Path:
    """Write ``augmented.png``: a row for each image, with other random numbers in each column.

    Args:
        cfg: whose training data and ``INPUT`` are used.
        output: folder to write to.
        images: how many, spread evenly over the data set.
        times: per image.

    Raises:
        DataError: if the training set cannot be read.
    """
    dataset: Any = build_train_loader(cfg).dataset
    names = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).thing_classes
    rows = []
    for record in spread(len(dataset), images):
        pictures, titles = [], []
        for number in range(times):
            mapped = dataset[Draw(record, mixed_seed(record, number))]
            instances = mapped["instances"]
            boxes, labels = instances.gt_boxes.tensor.numpy(), instances.gt_classes.tolist()
            picture = as_bgr(mapped["image"], cfg.INPUT.FORMAT)
            pictures.append(draw_boxes(picture, boxes, labels, names))
            titles.append(f"{picture.shape[1]} x {picture.shape[0]}")
        rows.append(side_by_side(pictures, titles))
    Path(output).mkdir(parents=True, exist_ok=True)
    path = Path(output) / "augmented.png"
    cv2.imwrite(str(path), one_below_the_other(rows))
    return path
