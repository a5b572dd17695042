"""Boxes drawn on images, and sheets of images.

Images are (H, W, 3) uint8 BGR, boxes (N, 4) xyxy in pixels of the image, within it or not. Small
images are enlarged: to a shorter side of 320 with class names, otherwise 240.
"""

import colorsys
import functools
import math
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from detectron2.structures import BoxMode, Instances
from PIL import Image, ImageDraw, ImageFont

from .fonts import Font, find_fonts, image_labels, opencv_draws

_GOLDEN_RATIO = 0.618034  # successive multiples spread hues evenly for any number of classes
_GRAY = (128, 128, 128)
_PATCH_COLOR = (40, 120, 240)
_MARGIN = 6
_TITLE_HEIGHT = 24
_POINTS = 30  # size of other fonts that is as large as OpenCV's at scale 1


def class_color(label: int) -> tuple[int, int, int]:
    """Return the fixed BGR color of a class id."""
    red, green, blue = colorsys.hsv_to_rgb((label * _GOLDEN_RATIO) % 1.0, 0.85, 0.95)
    return int(255 * blue), int(255 * green), int(255 * red)


def draw_boxes(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: Sequence[int],
    names: Sequence[str],
    scores: Sequence[float] | None = None,
) -> np.ndarray:
    """Draw boxes (N, 4) with class names on a copy of the image.

    `labels` are N indices of `names`; scores are N numbers in 0..1, or None for ground truth.
    """
    canvas, scale = _enlarge(image, 320)
    shown = image_labels(tuple(names))
    fonts = [shown[i].font for i in labels]
    texts = [shown[i].text for i in labels]
    if scores is not None:
        texts = [f"{text} {score:.2f}" for text, score in zip(texts, scores, strict=True)]
    for box, label, text, font in zip(boxes * scale, labels, texts, fonts, strict=True):
        color = class_color(label)
        x1, y1, x2, y2 = (round(float(v)) for v in box)
        cv2.rectangle(canvas, (x1, y1), (x2, y2), color, 2)
        width, height = _text_size(text, 0.4, font)
        top = max(y1 - height - 4, 0)
        cv2.rectangle(canvas, (x1, top), (x1 + width + 2, top + height + 4), color, -1)
        _put_text(canvas, text, (x1 + 1, top + height + 1), 0.4, font)
    return canvas


def draw_comparison(
    image: np.ndarray,
    record: dict[str, Any],
    detections: Instances,
    classes: list[str],
    threshold: float,
) -> np.ndarray:
    """Draw ground truth on the left, predictions with a score of at least `threshold` on the right.

    The ground truth is that of `record` in Detectron2's format, detections are on the CPU.
    """
    image = np.ascontiguousarray(image)
    labels = [a["category_id"] for a in record["annotations"]]
    truth = draw_boxes(image, annotation_boxes(record["annotations"]), labels, classes)
    detections = detections[detections.scores >= threshold]
    boxes, labels = detections.pred_boxes.tensor.numpy(), detections.pred_classes.tolist()
    prediction = draw_boxes(image, boxes, labels, classes, detections.scores.tolist())
    return hstack([truth, prediction], ["ground truth", f"prediction (score >= {threshold:g})"])


def annotation_boxes(annotations: Sequence[dict[str, Any]]) -> np.ndarray:
    """Return the boxes (N, 4) of annotations in Detectron2's format as xyxy in pixels."""
    boxes = [
        BoxMode.convert([float(v) for v in a["bbox"]], a["bbox_mode"], BoxMode.XYXY_ABS)
        for a in annotations
    ]
    return np.array(boxes, dtype=float).reshape(-1, 4)


def draw_anchors(
    image: np.ndarray, boxes: np.ndarray, scores: np.ndarray, patches: np.ndarray
) -> np.ndarray:
    """Draw patches (m, 4), thick, and anchors (N, 4), darker with a higher score (N,) in 0..1."""
    canvas, scale = _pale_copy(image)
    for patch in patches:
        _draw_outline(canvas, patch * scale, _PATCH_COLOR, 2)
    for index in np.argsort(scores):  # highest on top
        pale = round(200 * (1 - float(scores[index])))
        _draw_outline(canvas, boxes[index] * scale, (120 + pale // 2, pale, pale), 1)
    return canvas


def draw_assignment(
    image: np.ndarray,
    objects: np.ndarray,
    proposals: np.ndarray,
    assignment: np.ndarray,
    *,
    min_side: int = 240,
) -> np.ndarray:
    """Draw each ground truth in its own color, thick, and its proposals thin in the same color.

    Background proposals are not drawn; a ground truth without proposals is gray.

    Args:
        image: the image.
        objects: (M, 4) ground truth.
        proposals: (P, 4).
        assignment: (P,) index of the ground truth of each proposal, -1 for background.
        min_side: least shorter side of the picture, in pixels.
    """
    canvas, scale = _pale_copy(image, min_side)
    for index, box in enumerate(objects):
        positives = proposals[assignment == index]
        color = class_color(index) if len(positives) else _GRAY
        for drawn, thickness in [(box, 2), *((p, 1) for p in positives)]:
            _draw_outline(canvas, drawn * scale, color, thickness)
    return canvas


def draw_proposals(image: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Draw boxes (P, 4) without names, each in its own color, on the image with a margin."""
    canvas, scale = _pale_copy(image)
    pad = round(0.15 * min(canvas.shape[:2]))  # outlines of whole-image boxes lie outside of it
    canvas = np.pad(canvas, ((pad, pad), (pad, pad), (0, 0)), constant_values=255)
    for index, box in enumerate(boxes):
        _draw_outline(canvas, box * scale + pad, class_color(index), 1)
    return canvas


def hstack(images: Sequence[np.ndarray], titles: Sequence[str]) -> np.ndarray:
    """Put images of any sizes in a row under their titles, top aligned, on white."""
    height = max(i.shape[0] for i in images) + _TITLE_HEIGHT
    width = sum(i.shape[1] for i in images) + _MARGIN * (len(images) - 1)
    sheet = np.full((height, width, 3), 255, np.uint8)
    x = 0
    for image, title in zip(images, titles, strict=True):
        font = None if opencv_draws(title) else find_fonts((title,))[0]
        _put_text(sheet, title, (x + 2, 17), 0.5, font)
        bottom = _TITLE_HEIGHT + image.shape[0]
        sheet[_TITLE_HEIGHT:bottom, x : x + image.shape[1]] = image
        x += image.shape[1] + _MARGIN
    return sheet


def vstack(sheets: Sequence[np.ndarray]) -> np.ndarray:
    """Stack images of any widths, left aligned, on white."""
    width = max(s.shape[1] for s in sheets)
    margins = [((0, _MARGIN), (0, width - s.shape[1]), (0, 0)) for s in sheets]
    padded = [np.pad(s, m, constant_values=255) for s, m in zip(sheets, margins, strict=True)]
    return np.concatenate(padded)


def evenly_spaced(total: int, count: int) -> list[int]:
    """Return at most `count` indices, spread evenly over ``range(total)``."""
    places = np.linspace(0, total - 1, min(count, total)).round()
    indices: list[int] = places.astype(int).tolist()
    return indices


def _enlarge(image: np.ndarray, min_side: int) -> tuple[np.ndarray, float]:
    """Copy of an image with a shorter side of at least `min_side`, and its scale."""
    short, long = sorted(image.shape[:2])
    scale = max(1.0, min(min_side / short, 4 * min_side / long))  # a strip would get too long
    size = (round(image.shape[1] * scale), round(image.shape[0] * scale))
    return cv2.resize(image, size, interpolation=cv2.INTER_LINEAR), scale


def _pale_copy(image: np.ndarray, min_side: int = 240) -> tuple[np.ndarray, float]:
    """Pale copy of an image, on which boxes stand out, and its scale."""
    canvas, scale = _enlarge(image, min_side)
    return cv2.addWeighted(canvas, 0.7, np.full_like(canvas, 255), 0.3, 0), scale


def _draw_outline(
    canvas: np.ndarray, box: np.ndarray, color: tuple[int, int, int], thickness: int
) -> None:
    """Draw a box (4,), xyxy in pixels of the canvas; may exceed it and need not be finite."""
    limit = 4.0 * max(canvas.shape)  # corners farther away do not fit OpenCV's integers
    x1, y1, x2, y2 = np.clip(np.nan_to_num(box), -limit, limit).round().astype(int).tolist()
    cv2.rectangle(canvas, (x1, y1), (x2, y2), color, thickness)


def _put_text(
    canvas: np.ndarray, text: str, origin: tuple[int, int], scale: float, font: Font | None
) -> None:
    """Write black text on a canvas, in place; `origin` is the left end of its baseline."""
    if font is None:
        place = (origin, cv2.FONT_HERSHEY_SIMPLEX, scale, (0, 0, 0), 1, cv2.LINE_AA)
        cv2.putText(canvas, text.encode("utf-8", "replace").decode(), *place)
        return
    picture = Image.fromarray(canvas)
    face = _face(font.path, scale)
    ImageDraw.Draw(picture).text(origin, text, fill=(0, 0, 0), font=face, anchor="ls")
    canvas[...] = np.asarray(picture)


def _text_size(text: str, scale: float, font: Font | None) -> tuple[int, int]:
    """Width of a text, and its height above the baseline, in pixels."""
    (width, height), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, 1)
    if font is None:
        return width, height
    left, top, right, _ = _face(font.path, scale).getbbox(text, anchor="ls")
    return math.ceil(right - left), math.ceil(-top)


@functools.cache
def _face(path: str, scale: float) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, round(_POINTS * scale))
