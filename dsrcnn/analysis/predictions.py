"""Predictions beside ground truth, drawn for a trained model."""

from pathlib import Path

import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..data.build import explain_data_errors
from ..data.mapper import read_image
from ..errors import DataError
from ..visualization.draw import picture_of, spread
from .images import load_predictor

__all__ = ["draw_predictions"]


def draw_predictions(
    cfg: CfgNode,
    output: str | Path,
    *,
    images: int = 8,
    threshold: float = 0.3,
) -> list[Path]:
    """Write pictures of the first test set: ground truth at the left, predictions at the right.

    Args:
        cfg: with ``MODEL.WEIGHTS`` and ``DATASETS.TEST``.
        output: folder to write to.
        images: how many, spread evenly over the data set.
        threshold: smallest score that is drawn. Evaluation knows no threshold.

    Returns:
        The files written.

    Raises:
        DataError: if the test set cannot be read.
        WeightsError: if the weights are missing or do not fill the whole model.
    """
    if not cfg.DATASETS.TEST:
        raise DataError(
            "DATASETS.TEST is empty, so there are no images to draw. Write a registered name, or "
            "DATASETS.CUSTOM.TEST_JSON and TEST_IMAGES."
        )
    predictor = load_predictor(cfg)
    name = cfg.DATASETS.TEST[0]
    with explain_data_errors(name):
        records = DatasetCatalog.get(name)
    classes = MetadataCatalog.get(name).thing_classes
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for index in spread(len(records), images):
        record = dict(records[index])
        image = np.ascontiguousarray(read_image(record, "BGR"))
        found = predictor(image)["instances"].to("cpu")
        picture = picture_of(image, record, found, classes, threshold)
        path = folder / f"{index:05d}_{Path(record['file_name']).stem}.png"
        cv2.imwrite(str(path), picture)
        written.append(path)
    return written
