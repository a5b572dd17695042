"""Boxes with class names on images, and sheets of images."""

import colorsys
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from detectron2.structures import BoxMode, Instances

__all__ = [
    "class_colour",
    "draw_anchors",
    "draw_assignment",
    "draw_boxes",
    "draw_proposals",
    "one_below_the_other",
    "outline",
    "pale_copy",
    "picture_of",
    "side_by_side",
    "spread",
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


_PATCH = (40, 120, 240)  # BGR


def draw_anchors(
    image: np.ndarray,
    boxes: np.ndarray,
    scores: np.ndarray,
    patches: np.ndarray,
    *,
    min_side: int = 240,
) -> np.ndarray:
    """Draw patches, thick, and anchors, the darker the better, on a pale copy of the image.

    Args:
        image: (H, W, 3) uint8 BGR.
        boxes: (N, 4) xyxy in pixels of the image; they may leave it.
        scores: (N,) location scores in 0..1.
        patches: (m, 4) xyxy in pixels.
        min_side: a smaller image is enlarged to this shorter side.
    """
    canvas, scale = pale_copy(image, min_side)
    for patch in patches:
        outline(canvas, patch * scale, _PATCH, 2)
    for index in np.argsort(scores):  # the best on top
        pale = round(200 * (1 - float(scores[index])))
        outline(canvas, boxes[index] * scale, (120 + pale // 2, pale, pale), 1)
    return canvas


def draw_assignment(
    image: np.ndarray,
    objects: np.ndarray,
    proposals: np.ndarray,
    assignment: np.ndarray,
    *,
    min_side: int = 240,
) -> np.ndarray:
    """Draw every ground truth in a colour of its own, thick, and its proposals thin in the same.

    Proposals that learn background are left out; a ground truth that nobody learns is grey.

    Args:
        image: (H, W, 3) uint8 BGR; it is drawn pale, so that boxes stand out.
        objects: (M, 4) xyxy in pixels of the image.
        proposals: (P, 4) likewise.
        assignment: (P,) index of the ground truth each proposal learns, -1 for background.
        min_side: a smaller image is enlarged to this shorter side.
    """
    canvas, scale = pale_copy(image, min_side)
    for index, box in enumerate(objects):
        learners = proposals[assignment == index]
        colour = class_colour(index) if len(learners) else (128, 128, 128)
        for member, thickness in [(box, 2), *((p, 1) for p in learners)]:
            outline(canvas, member * scale, colour, thickness)
    return canvas


def draw_proposals(image: np.ndarray, boxes: np.ndarray, *, min_side: int = 240) -> np.ndarray:
    """Draw boxes without names on a pale copy of the image, every proposal in its own colour.

    Args:
        image: (H, W, 3) uint8 BGR.
        boxes: (P, 4) xyxy in pixels of the image; they may leave it.
        min_side: a smaller image is enlarged to this shorter side.
    """
    canvas, scale = pale_copy(image, min_side)
    pad = round(0.15 * min(canvas.shape[:2]))  # boxes of about the whole image lie around it
    canvas = np.pad(canvas, ((pad, pad), (pad, pad), (0, 0)), constant_values=255)
    for index, box in enumerate(boxes):
        outline(canvas, box * scale + pad, class_colour(index), 1)
    return canvas


def picture_of(
    image: np.ndarray,
    record: dict[str, Any],
    found: Instances,
    classes: list[str],
    threshold: float,
) -> np.ndarray:
    """Ground truth at the left, predictions at the right.

    Args:
        image: (H, W, 3) uint8, BGR.
        record: of the image, with ``annotations``.
        found: detections in pixels of the image, on the CPU.
        classes: names.
        threshold: smallest score that is drawn.
    """
    image = np.ascontiguousarray(image)
    truth = _draw_annotations(image, record["annotations"], classes)
    found = found[found.scores >= threshold]
    prediction = draw_boxes(
        image,
        found.pred_boxes.tensor.numpy(),
        found.pred_classes.tolist(),
        classes,
        found.scores.tolist(),
    )
    titles = ["ground truth", f"prediction (score >= {threshold:g})"]
    return side_by_side([truth, prediction], titles)


def spread(total: int, count: int) -> list[int]:
    """At most `count` indices, spread evenly over `total`."""
    chosen: list[int] = np.unique(np.linspace(0, total - 1, count).round().astype(int)).tolist()
    return chosen


def _draw_annotations(image: np.ndarray, annotations: list[dict], names: list[str]) -> np.ndarray:
    boxes = [
        BoxMode.convert(list(a["bbox"]), a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations
    ]
    labels = [a["category_id"] for a in annotations]
    return draw_boxes(image, np.array(boxes, dtype=float).reshape(-1, 4), labels, names)
