"""A sheet of annotated images of a data set."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from detectron2.structures import BoxMode

from ..data.datasets.validate import box_fault
from ..visualization.draw import draw_boxes, one_below_the_other, side_by_side

__all__ = ["draw_sheet"]


def draw_sheet(
    samples: Sequence[tuple[dict[str, Any], Sequence[str]]],
    output: str | Path,
    *,
    images: int = 12,
    columns: int = 4,
) -> None:
    """Draw images spread evenly over a data set with their boxes; unreadable ones are left out.

    Args:
        samples: records in Detectron2's format, each with the class names of its split.
        output: file to write.
        images: at most so many.
        columns: per row.
    """
    step = max(1, len(samples) // images)
    pictures, titles = [], []
    for record, classes in samples[::step][:images]:
        image = cv2.imread(record["file_name"])
        if image is not None:
            pictures.append(_picture(image, record["annotations"], classes))
            titles.append(Path(record["file_name"]).name[:36])
    if not pictures:
        pictures, titles = [np.full((320, 320, 3), 255, np.uint8)], ["no image can be read"]
    rows = [
        side_by_side(pictures[i : i + columns], titles[i : i + columns])
        for i in range(0, len(pictures), columns)
    ]
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(output), one_below_the_other(rows))


def _picture(image: np.ndarray, annotations: Sequence[Any], classes: Sequence[str]) -> np.ndarray:
    drawable = [a for a in annotations if box_fault(a) is None]
    boxes = [
        BoxMode.convert(list(map(float, a["bbox"])), a["bbox_mode"], BoxMode.XYXY_ABS)
        for a in drawable
    ]
    scale = 320 / min(image.shape[:2])
    size = (round(image.shape[1] * scale), round(image.shape[0] * scale))
    corners = np.array(boxes, dtype=float).reshape(-1, 4) * scale
    return draw_boxes(
        cv2.resize(image, size), corners, [a["category_id"] for a in drawable], classes
    )
