"""Prediction of large images in tiles that overlap, merged afterwards.

Notation: ``K`` detections.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..errors import ConfigError

_EDGE = 2.0  # pixels: a box that near to an inner edge of its tile is cut there


class Tile(NamedTuple):
    """A part of an image, in its pixels: x1, y1, x2, y2."""

    x1: int
    y1: int
    x2: int
    y2: int

    def crop(self, image: np.ndarray) -> np.ndarray:
        """Cut the tile (h, w, 3) out of an image (H, W, 3)."""
        return image[self.y1 : self.y2, self.x1 : self.x2]


def make_tiles(height: int, width: int, side: int, overlap: float = 0.2) -> list[Tile]:
    """Cover an image with tiles of `side` pixels, rows from the top, as few as possible.

    Neighbors overlap by at least `overlap` of a side. A dimension shorter than `side` gets one.

    Raises:
        ConfigError: if the side is not positive or the overlap not in 0..0.9.
    """
    if side < 1:
        raise ConfigError(f"The side of tiles is {side}; write a number of pixels from 1 on.")
    if not 0 <= overlap <= 0.9:
        raise ConfigError(f"The overlap of tiles is {overlap}; write a number from 0 to 0.9.")
    xs, ys = (_starts(extent, side, overlap) for extent in (width, height))
    return [Tile(x, y, min(x + side, width), min(y + side, height)) for y in ys for x in xs]


def _starts(extent: int, side: int, overlap: float) -> list[int]:
    if extent <= side:
        return [0]
    stride = max(1, int(side * (1 - overlap)))
    count = 1 + -(-(extent - side) // stride)
    return [round(i * (extent - side) / (count - 1)) for i in range(count)]


def merge_tiles(
    tiles: Sequence[Tile],
    detections: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    size: tuple[int, int],
    *,
    threshold: float = 0.5,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Move the detections of tiles to the image, and suppress those of the same object.

    From the best down, a detection removes those of its class in other tiles with an IoU above
    `threshold`. A box that the inner edge of a tile cuts is also the same object as a larger one
    that covers more than `threshold` of it: a part has a small IoU with the whole, which a neighbor
    sees. Detections of one tile never remove each other; the model has chosen them.

    Args:
        tiles: parts of the image.
        detections: of each tile: boxes (K, 4) in its pixels, scores (K,), labels (K,).
        size: height and width of the image.
        threshold: of the overlap.

    Returns:
        Boxes, scores and labels, best first.
    """
    offsets = [np.array([tile.x1, tile.y1] * 2, np.float32) for tile in tiles]
    parts = zip(offsets, detections, strict=True)
    boxes = np.concatenate([boxes + offset for offset, (boxes, _, _) in parts])
    scores = np.concatenate([s for _, s, _ in detections])
    labels = np.concatenate([c for _, _, c in detections])
    cut = np.concatenate(
        [_is_cut(b, tile, size) for tile, (b, _, _) in zip(tiles, detections, strict=True)]
    )
    source = np.repeat(np.arange(len(tiles)), [len(s) for _, s, _ in detections])
    # Whole boxes first, so that a part with a higher score does not remove its object.
    order = np.lexsort((-scores, cut))
    kept: list[int] = []
    removed = np.zeros(len(boxes), dtype=bool)
    for index in order:
        if removed[index]:
            continue
        kept.append(int(index))
        overlap = _overlap(index, boxes, cut)
        same = (labels == labels[index]) & (source != source[index])
        removed |= (overlap > threshold) & same
    chosen = np.array(sorted(kept, key=lambda i: -scores[i]), dtype=int)
    return boxes[chosen], scores[chosen], labels[chosen]


def _is_cut(boxes: np.ndarray, tile: Tile, size: tuple[int, int]) -> np.ndarray:
    """Whether boxes (K, 4) in pixels of a tile touch an inner edge of it, (K,)."""
    height, width = size
    left, top = (boxes[:, 0] < _EDGE) & (tile.x1 > 0), (boxes[:, 1] < _EDGE) & (tile.y1 > 0)
    right = (boxes[:, 2] > tile.x2 - tile.x1 - _EDGE) & (tile.x2 < width)
    bottom = (boxes[:, 3] > tile.y2 - tile.y1 - _EDGE) & (tile.y2 < height)
    return np.asarray(left | top | right | bottom)


def _overlap(index: int, boxes: np.ndarray, cut: np.ndarray) -> np.ndarray:
    """IoU of a box with boxes (K, 4); with the part of an object: its share in the larger box."""
    box = boxes[index]
    corner = np.maximum(box[:2], boxes[:, :2])
    extent = (np.minimum(box[2:], boxes[:, 2:]) - corner).clip(min=0)
    intersection = extent.prod(axis=1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    is_part = np.where(areas < areas[index], cut, cut[index])  # is the smaller one cut?
    union = areas[index] + areas - intersection
    whole = np.where(is_part, np.minimum(areas[index], areas), union)
    return np.asarray(intersection / whole.clip(min=1e-6))
