"""Initial proposals on their image, and the weights that mixed them."""

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .draw import class_colour, outline, pale_copy

__all__ = ["draw_expert_weights", "draw_proposals"]


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


def draw_expert_weights(weights: np.ndarray, titles: list[str]) -> np.ndarray:
    """Heat maps, one per image: experts downwards, proposals to the right.

    Args:
        weights: (B, E, P) in 0..1.
        titles: B names of images.

    Returns:
        The picture, BGR.
    """
    images = len(weights)
    figure = Figure(figsize=(9, 0.5 + 1.3 * images), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for axes, values, title in zip(
        figure.subplots(images, 1, squeeze=False)[:, 0], weights, titles, strict=True
    ):
        shown = axes.imshow(values, aspect="auto", vmin=0, vmax=1, cmap="viridis")
        axes.set_title(title, fontsize=9)
        axes.set_ylabel("expert")
        axes.set_yticks(range(values.shape[0]))
    axes.set_xlabel("proposal")
    figure.colorbar(shown, ax=figure.axes, label="weight")
    canvas.draw()
    return np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., 2::-1])
