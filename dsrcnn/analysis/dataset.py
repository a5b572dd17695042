"""Sheet of annotated images of a dataset."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ..data.datasets.validate import box_fault
from ..data.images import read_image
from ..errors import DataError
from ..visualization.draw import annotation_boxes, draw_boxes, evenly_spaced, hstack, vstack
from .images import save_image

_IMAGES = 12
_COLUMNS = 4
_SIDE = 320
_MAX_SIDE = 1280


def draw_sheet(samples: Sequence[tuple[dict[str, Any], Sequence[str]]], output: str | Path) -> None:
    """Draw twelve evenly spaced images of a dataset with their boxes to the file `output`.

    Samples are records in Detectron2's format, each with the class names of its split; unreadable
    images are skipped.
    """
    tiles, titles = [], []
    for index in evenly_spaced(len(samples), _IMAGES):
        record, classes = samples[index]
        try:
            image = read_image({"file_name": record["file_name"]}, "BGR")
        except DataError:
            continue
        tiles.append(_draw_record(image, record["annotations"], classes))
        titles.append(Path(record["file_name"]).name[:36])
    if not tiles:
        tiles, titles = [np.full((_SIDE, _SIDE, 3), 255, np.uint8)], ["no image can be read"]
    starts = range(0, len(tiles), _COLUMNS)
    rows = [hstack(tiles[i : i + _COLUMNS], titles[i : i + _COLUMNS]) for i in starts]
    save_image(Path(output), vstack(rows))


def _draw_record(
    image: np.ndarray, annotations: Sequence[Any], classes: Sequence[str]
) -> np.ndarray:
    """Draw the usable boxes on an image that is resized to one shorter side for all."""
    usable = [a for a in annotations if box_fault(a) is None]
    scale = min(_SIDE / min(image.shape[:2]), _MAX_SIDE / max(image.shape[:2]))
    size = max(round(image.shape[1] * scale), 1), max(round(image.shape[0] * scale), 1)
    resized = cv2.resize(image, size)
    labels = [a["category_id"] for a in usable]
    return draw_boxes(resized, annotation_boxes(usable) * scale, labels, classes)
