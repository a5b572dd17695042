"""Prediction of large images in tiles that overlap, merged afterwards.

Notation: ``K`` detections, ``T`` tiles.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from ..errors import ConfigError

_EDGE, _EDGE_SHARE = 2.0, 0.01  # pixels, share of the side: so near to an edge a box is cut
_AGREEMENT = 0.5  # least IoU, along the edge, of the parts of an object
_DUPLICATE = 0.7  # least IoU of two parts of an object in one tile
_SLACK = 0.1  # of the overlap of two tiles that a part need not reach over


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
    """Move the detections of tiles to the image, and make one of those of the same object.

    From the best down, a detection removes those of its class in other tiles with an IoU above
    `threshold`. A box that the inner edge of a tile cuts is also the same object as a larger one
    that covers more than `threshold` of it: a part has a small IoU with the whole, which a neighbor
    sees. Parts of an object that no tile sees as a whole are joined, see `_join`. Otherwise
    detections of one tile never remove each other; the model has chosen them.

    Args:
        tiles: parts of the image.
        detections: of each tile: boxes (K, 4) in its pixels, scores (K,), labels (K,).
        size: height and width of the image.
        threshold: of the overlap.

    Returns:
        Boxes, scores and labels, best first.
    """
    found = _Found(tiles, detections, size)
    whole = np.flatnonzero(~found.is_cut)
    kept = found.suppress(whole, threshold)  # first, so that a part never removes its object
    parts = found.suppress(_join(found), threshold)
    chosen = np.array(sorted(kept + parts, key=lambda i: -found.scores[i]), dtype=int)
    return found.boxes[chosen], found.scores[chosen], found.labels[chosen]


class _Found:
    """Detections of all tiles, in pixels of the image.

    Attributes:
        boxes, scores, labels: (K, 4), (K,), (K,).
        cut: whether a box ends at the left, upper, right and lower inner edge of its tile, (K, 4).
        is_cut: whether any edge cuts a box, (K,).
        members: tiles that saw a detection, of each one.
        removed: (K,) bool.
    """

    def __init__(
        self,
        tiles: Sequence[Tile],
        detections: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
        size: tuple[int, int],
    ) -> None:
        self.tiles = np.array(tiles).reshape(-1, 4)
        counts = [len(scores) for _, scores, _ in detections]
        source = np.repeat(np.arange(len(tiles)), counts)
        offsets = self.tiles[source][:, [0, 1, 0, 1]].astype(np.float32)
        self.boxes = np.concatenate([boxes for boxes, _, _ in detections]) + offsets
        self.scores = np.concatenate([scores for _, scores, _ in detections])
        self.labels = np.concatenate([labels for _, _, labels in detections])
        self.cut: np.ndarray = _cut_edges(self.boxes, self.tiles[source], size)
        self.is_cut = np.asarray(self.cut.any(axis=1))
        self.members = [frozenset([int(tile)]) for tile in source]
        self.removed = np.zeros(len(self.boxes), dtype=bool)
        ends = np.cumsum(counts)
        self._of_tile = [np.arange(end - n, end) for end, n in zip(ends, counts, strict=True)]
        self.neighbors = cache(self._neighbors)  # of a tile

    def _neighbors(self, tile: int) -> np.ndarray:
        """Tiles that overlap or touch one, itself included."""
        x1, y1, x2, y2 = self.tiles[tile]
        others = self.tiles.T
        in_x = (others[0] <= x2) & (others[2] >= x1)
        return np.flatnonzero(in_x & (others[1] <= y2) & (others[3] >= y1))

    def left_in(self, tile: int) -> np.ndarray:
        """Indices of the detections of a tile that are not removed."""
        indices = self._of_tile[tile]
        return indices[~self.removed[indices]]

    def add(self, group: list[int]) -> int:
        """Replace the parts of an object by one detection; returns its index."""
        boxes = self.boxes[group]
        box = np.concatenate([boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)])
        best = group[int(self.scores[group].argmax())]
        index = len(self.scores)
        self.boxes = np.concatenate([self.boxes, box[None]])
        self.scores = np.append(self.scores, self.scores[best])
        self.labels = np.append(self.labels, self.labels[best])
        self.is_cut = np.append(self.is_cut, False)
        self.removed = np.append(self.removed, False)
        self.removed[group] = True
        self.members.append(frozenset().union(*(self.members[i] for i in group)))
        for tile in self.members[index]:
            self._of_tile[tile] = np.append(self._of_tile[tile], index)
        return index

    def remove_duplicates(self, group: list[int], single: set[int]) -> None:
        """Remove single parts that nearly equal those of an object in the same tiles."""
        for index in group:
            near = self.left_in(min(self.members[index]))
            is_single = np.array([int(other) in single for other in near], dtype=bool)
            near = near[is_single & (self.labels[near] == self.labels[index])]
            overlap = _overlap(
                self.boxes[index], False, self.boxes[near], np.zeros(len(near), bool)
            )
            self.removed[near[overlap > _DUPLICATE]] = True

    def suppress(self, candidates: np.ndarray, threshold: float) -> list[int]:
        """Let detections, whole ones first, best first, remove others; returns those that stay."""
        kept = list[int]()
        for index in candidates[np.lexsort((-self.scores[candidates], self.is_cut[candidates]))]:
            if self.removed[index]:
                continue
            kept.append(int(index))
            near = self._near(int(index))
            is_cut = bool(self.is_cut[index])
            overlap = _overlap(self.boxes[index], is_cut, self.boxes[near], self.is_cut[near])
            for other in near[(overlap > threshold) & (self.labels[near] == self.labels[index])]:
                if self.members[index].isdisjoint(self.members[other]):
                    self.removed[other] = True
        return kept

    def _near(self, index: int) -> np.ndarray:
        """Detections of the tiles around one that are not removed."""
        tiles = {int(t) for member in self.members[index] for t in self.neighbors(member)}
        return np.unique(np.concatenate([self.left_in(tile) for tile in sorted(tiles)]))


def _cut_edges(boxes: np.ndarray, tiles: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Whether boxes (K, 4) end at the inner edges of their tiles (K, 4), (K, 4)."""
    height, width = size
    sides = tiles[:, 2:] - tiles[:, :2]
    near = np.maximum(_EDGE, _EDGE_SHARE * np.concatenate([sides, sides], axis=1))
    is_inner = tiles != np.array([0, 0, width, height])
    return np.asarray((np.abs(boxes - tiles) < near) & is_inner)


def _overlap(box: np.ndarray, is_cut: bool, boxes: np.ndarray, are_cut: np.ndarray) -> np.ndarray:
    """IoU of a box with others; with the part of an object: its share in the larger box."""
    corner = np.maximum(box[:2], boxes[:, :2])
    intersection = (np.minimum(box[2:], boxes[:, 2:]) - corner).clip(min=0).prod(axis=1)
    area, areas = (box[2:] - box[:2]).prod(), (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    is_part = np.where(areas < area, are_cut, is_cut)  # is the smaller one cut?
    whole = np.where(is_part, np.minimum(area, areas), area + areas - intersection)
    return np.asarray(intersection / whole.clip(min=1e-6))


def _join(found: _Found) -> np.ndarray:
    """Replace parts of an object that is cut in each of its tiles by their bounding box.

    Two parts in neighboring tiles of a row are of one object if the first ends at the right edge of
    its tile and the second begins at the left edge of its own, both reach over what the tiles
    share, and their vertical extents agree; in a column likewise. An object that does not reach
    over the overlap is whole in one of the tiles. The pairs that agree most are joined first, and a
    tile has one part of an object at most; models without NMS may repeat it, which goes.

    Returns:
        Indices of the remaining parts and the new boxes.
    """
    parts = np.flatnonzero(found.is_cut & ~found.removed)
    groups = {int(index): [int(index)] for index in parts}
    tiles = {index: found.members[index] for index in groups}
    for _, first, second in sorted(_pairs(found, groups), reverse=True):
        a, b = groups[first], groups[second]
        if a is b or not tiles[a[0]].isdisjoint(tiles[b[0]]):
            continue
        joined, seen = a + b, tiles[a[0]] | tiles[b[0]]
        for index in joined:
            groups[index], tiles[index] = joined, seen
    unique = {group[0]: group for group in groups.values()}
    several = [group for group in unique.values() if len(group) > 1]
    single = {index for index, group in unique.items() if len(group) == 1}
    for group in several:
        found.remove_duplicates(group, single)
    rest = [index for index in sorted(single) if not found.removed[index]]
    return np.array([*map(found.add, several), *rest], dtype=int)


def _pairs(found: _Found, parts: dict[int, list[int]]) -> Iterator[tuple[float, int, int]]:
    """Pairs of parts that may be of one object, with their agreement."""
    for tile in sorted({min(found.members[index]) for index in parts}):
        for other in map(int, found.neighbors(tile)):
            for axis in (0, 1):  # the next ones in a row, in a column
                starts, across = found.tiles[[tile, other], axis], found.tiles[[tile, other]]
                if starts[0] < starts[1] and across[0, 1 - axis] == across[1, 1 - axis]:
                    yield from _pairs_of(found, tile, other, axis)


def _pairs_of(found: _Found, tile: int, other: int, axis: int) -> Iterator[tuple[float, int, int]]:
    """Pairs of parts of two tiles, of which `other` follows along x (0) or y (1)."""
    first, second = found.left_in(tile), found.left_in(other)
    start, end = found.tiles[other, axis], found.tiles[tile, 2 + axis]  # of what they share
    slack = _EDGE + _SLACK * (end - start)
    first = first[found.cut[first, 2 + axis] & (found.boxes[first, axis] <= start + slack)]
    second = second[found.cut[second, axis] & (found.boxes[second, 2 + axis] >= end - slack)]
    low, high = 1 - axis, 3 - axis  # extent along the edge
    a, b = found.boxes[first][:, None], found.boxes[second][None]
    shared = np.minimum(a[..., high], b[..., high]) - np.maximum(a[..., low], b[..., low])
    extent = np.maximum(a[..., high], b[..., high]) - np.minimum(a[..., low], b[..., low])
    agreement = shared / extent.clip(min=1e-6)
    is_one = found.labels[first][:, None] == found.labels[second][None]
    is_one &= b[..., axis] - a[..., 2 + axis] <= _EDGE  # nothing lies between them
    for i, j in zip(*np.nonzero(is_one & (agreement > _AGREEMENT)), strict=True):
        yield float(agreement[i, j]), int(first[i]), int(second[j])
