"""Boxes with class names on images, and sheets of images."""

import colorsys
from collections.abc import Sequence

import cv2
import numpy as np

__all__ = [
    "class_colour",
    "draw_boxes",
    "one_below_the_other",
    "outline",
    "pale_copy",
    "side_by_side",
]

_GOLDEN_RATIO = 0.618034  # successive multiples spread hues evenly for any number of classes
_MARGIN = 6


def class_colour(label: int) -> tuple[int, int, int]:
    """A fixed BGR colour for a class id."""
    red, green, blue = colorsys.hsv_to_rgb((label * _GOLDEN_RATIO) % 1.0, 0.85, 0.95)
    return int(255 * blue), int(255 * green), int(255 * red)


def draw_boxes(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: Sequence[int],
    names: Sequence[str],
    scores: Sequence[float] | None = None,
    *,
    min_side: int = 320,
) -> np.ndarray:
    """Draw boxes with class names and scores on a copy of the image.

    Args:
        image: (H, W, 3) uint8 BGR.
        boxes: (N, 4) xyxy in pixels of the image.
        labels: N class ids.
        names: class names.
        scores: N scores in 0..1, or None for ground truth.
        min_side: a smaller image is enlarged to this shorter side, so that text can be read.
    """
    scale = max(1.0, min_side / min(image.shape[:2]))
    size = (round(image.shape[1] * scale), round(image.shape[0] * scale))
    canvas = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
    texts = [names[i] for i in labels]
    if scores is not None:
        texts = [f"{text} {score:.2f}" for text, score in zip(texts, scores, strict=True)]
    for box, label, text in zip(boxes * scale, labels, texts, strict=True):
        colour = class_colour(label)
        x1, y1, x2, y2 = (round(float(v)) for v in box)
        cv2.rectangle(canvas, (x1, y1), (x2, y2), colour, 2)
        (width, height), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 0.4, 1)
        top = max(y1 - height - 4, 0)
        cv2.rectangle(canvas, (x1, top), (x1 + width + 2, top + height + 4), colour, -1)
        cv2.putText(
            canvas, text, (x1 + 1, top + height + 1), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1,
            cv2.LINE_AA,
        )  # fmt: skip
    return canvas


def pale_copy(image: np.ndarray, min_side: int) -> tuple[np.ndarray, float]:
    """A picture on which boxes stand out, and its scale.

    Args:
        image: (H, W, 3) uint8 BGR.
        min_side: a smaller image is enlarged to this shorter side.
    """
    scale = max(1.0, min_side / min(image.shape[:2]))
    canvas = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)
    return cv2.addWeighted(canvas, 0.7, np.full_like(canvas, 255), 0.3, 0), scale


def outline(
    canvas: np.ndarray, box: np.ndarray, colour: tuple[int, int, int], thickness: int
) -> None:
    """Draw a box (4,), xyxy in pixels of the canvas; it may leave it, or not be finite."""
    limit = 4.0 * max(canvas.shape)  # far corners of wild boxes do not fit OpenCV's integers
    x1, y1, x2, y2 = np.clip(np.nan_to_num(box), -limit, limit).round().astype(int).tolist()
    cv2.rectangle(canvas, (x1, y1), (x2, y2), colour, thickness)


def side_by_side(images: Sequence[np.ndarray], titles: Sequence[str]) -> np.ndarray:
    """Put images of any sizes in a row under their titles, top aligned, on white."""
    bar = 24
    height = max(i.shape[0] for i in images) + bar
    width = sum(i.shape[1] for i in images) + _MARGIN * (len(images) - 1)
    sheet = np.full((height, width, 3), 255, np.uint8)
    x = 0
    for image, title in zip(images, titles, strict=True):
        cv2.putText(
            sheet, title, (x + 2, 17), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1, cv2.LINE_AA
        )
        sheet[bar : bar + image.shape[0], x : x + image.shape[1]] = image
        x += image.shape[1] + _MARGIN
    return sheet


def one_below_the_other(sheets: Sequence[np.ndarray]) -> np.ndarray:
    """Stack images of any widths, left aligned, on white."""
    width = max(s.shape[1] for s in sheets)
    padded = [
        np.pad(s, ((0, _MARGIN), (0, width - s.shape[1]), (0, 0)), constant_values=255)
        for s in sheets
    ]
    return np.concatenate(padded)
