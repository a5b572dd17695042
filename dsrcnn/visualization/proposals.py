"""Initial proposals on their image, and the weights that mixed them."""

import cv2
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .draw import class_colour

__all__ = ["draw_expert_weights", "draw_proposals"]


def draw_proposals(image: np.ndarray, boxes: np.ndarray, *, min_side: int = 240) -> np.ndarray:
    """Draw boxes without names on a pale copy of the image, every proposal in its own colour.

    Args:
        image: (H, W, 3) uint8 BGR.
        boxes: (P, 4) xyxy in pixels of the image; they may leave it.
        min_side: a smaller image is enlarged to this shorter side.
    """
    scale = max(1.0, min_side / min(image.shape[:2]))
    canvas = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)
    canvas = cv2.addWeighted(canvas, 0.7, np.full_like(canvas, 255), 0.3, 0)
    pad = round(0.15 * min(canvas.shape[:2]))  # boxes of about the whole image lie around it
    canvas = np.pad(canvas, ((pad, pad), (pad, pad), (0, 0)), constant_values=255)
    limit = 4.0 * max(canvas.shape)
    for index, box in enumerate(boxes):
        corners = np.clip(np.nan_to_num(box) * scale + pad, -limit, limit).round().astype(int)
        x1, y1, x2, y2 = corners.tolist()
        cv2.rectangle(canvas, (x1, y1), (x2, y2), class_colour(index), 1)
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
