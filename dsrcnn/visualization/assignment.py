"""Who learns what: an assignment drawn on its image."""

import numpy as np

from .draw import class_colour, outline, pale_copy

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
    canvas, scale = pale_copy(image, min_side)
    for index, box in enumerate(objects):
        learners = proposals[assignment == index]
        colour = class_colour(index) if len(learners) else (128, 128, 128)
        for member, thickness in [(box, 2), *((p, 1) for p in learners)]:
            outline(canvas, member * scale, colour, thickness)
    return canvas
