"""Anchors of an image, and the patches they were found on."""

import numpy as np

from .draw import outline, pale_copy

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
    canvas, scale = pale_copy(image, min_side)
    for patch in patches:
        outline(canvas, patch * scale, _PATCH, 2)
    for index in np.argsort(scores):  # the best on top
        pale = round(200 * (1 - float(scores[index])))
        outline(canvas, boxes[index] * scale, (120 + pale // 2, pale, pale), 1)
    return canvas
