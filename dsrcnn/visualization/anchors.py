"""Anchors of an image, and the patches they were found on."""

import cv2
import numpy as np

__all__ = ["draw_anchors"]

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
    scale = max(1.0, min_side / min(image.shape[:2]))
    canvas = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)
    canvas = cv2.addWeighted(canvas, 0.6, np.full_like(canvas, 255), 0.4, 0)
    limit = 4.0 * max(canvas.shape)

    def rectangle(box: np.ndarray, colour: tuple[int, int, int], width: int) -> None:
        corners = np.clip(np.nan_to_num(box) * scale, -limit, limit).round().astype(int)
        x1, y1, x2, y2 = corners.tolist()
        cv2.rectangle(canvas, (x1, y1), (x2, y2), colour, width)

    for patch in patches:
        rectangle(patch, _PATCH, 2)
    for index in np.argsort(scores):  # the best on top
        pale = round(200 * (1 - float(scores[index])))
        rectangle(boxes[index], (120 + pale // 2, pale, pale), 1)
    return canvas
