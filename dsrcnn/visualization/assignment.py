"""Who learns what: an assignment drawn on its image."""

import cv2
import numpy as np

from .draw import class_colour

__all__ = ["draw_assignment"]


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
    scale = max(1.0, min_side / min(image.shape[:2]))
    canvas = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)
    canvas = cv2.addWeighted(canvas, 0.7, np.full_like(canvas, 255), 0.3, 0)
    limit = 4.0 * max(canvas.shape)  # far corners of wild boxes do not fit OpenCV's integers
    for index, box in enumerate(objects):
        learners = proposals[assignment == index]
        colour = class_colour(index) if len(learners) else (128, 128, 128)
        for member, thickness in [(box, 2), *((p, 1) for p in learners)]:
            corners = np.clip(np.nan_to_num(member) * scale, -limit, limit).round().astype(int)
            x1, y1, x2, y2 = corners.tolist()
            cv2.rectangle(canvas, (x1, y1), (x2, y2), colour, thickness)
    return canvas
