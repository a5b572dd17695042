"""Tiles: they cover the image and overlap; what is cut at an edge is merged with the whole."""

import numpy as np
import pytest

from dsrcnn.errors import ConfigError
from dsrcnn.inference.tiling import Tile, make_tiles, merge_tiles


@pytest.mark.parametrize("size", [(100, 100), (500, 300), (123, 457), (64, 1000), (80, 64)])
@pytest.mark.parametrize(("side", "overlap"), [(64, 0.2), (100, 0.0), (97, 0.5)])
def test_tiles_cover_the_image_overlap_and_are_no_more_than_needed(size, side, overlap):
    height, width = size
    tiles = make_tiles(height, width, side, overlap)
    covered = np.zeros(size, dtype=int)
    for tile in tiles:
        covered[tile.y1 : tile.y2, tile.x1 : tile.x2] += 1
        assert tile.y2 - tile.y1 == min(side, height)
        assert tile.x2 - tile.x1 == min(side, width)
    assert covered.min() == 1 or (covered.min() > 1 and overlap >= 0.5)
    columns = sorted({tile.x1 for tile in tiles})
    gaps = np.diff(columns)
    assert (gaps <= int(side * (1 - overlap)) + 1).all()
    if width > side:  # one column less would not do
        assert (len(columns) - 2) * int(side * (1 - overlap)) < width - side


@pytest.mark.parametrize(("side", "overlap", "words"), [
    (0, 0.2, "side of tiles is 0"), (64, 1.0, "overlap of tiles is 1.0"), (64, -0.1, "is -0.1"),
])  # fmt: skip
def test_impossible_tiles_are_refused(side, overlap, words):
    with pytest.raises(ConfigError, match=words):
        make_tiles(100, 100, side, overlap)


def detections(*rows):
    rows = np.array(rows, np.float32).reshape(-1, 6)
    return rows[:, :4], rows[:, 4], rows[:, 5].astype(int)


TILES = [Tile(0, 0, 100, 100), Tile(80, 0, 180, 100)]


def merge(left, right):
    boxes, scores, labels = merge_tiles(TILES, [detections(*left), detections(*right)], (100, 180))
    rows = zip(boxes.tolist(), scores.tolist(), labels.tolist(), strict=True)
    return [(*box, round(score, 2), label) for box, score, label in rows]


def test_detections_move_to_the_image_and_are_sorted():
    merged = merge([(10, 10, 30, 30, 0.5, 1)], [(50, 20, 70, 40, 0.9, 0)])
    assert merged == [(130, 20, 150, 40, 0.9, 0), (10, 10, 30, 30, 0.5, 1)]


def test_an_object_in_the_overlap_is_detected_once_and_other_classes_stay():
    left, right = (82, 10, 96, 30, 0.8, 0), (2.5, 10, 16, 30, 0.7, 0)
    assert merge([left], [right]) == [(82, 10, 96, 30, 0.8, 0)]
    assert len(merge([left], [(*right[:5], 1)])) == 2


def test_the_part_of_an_object_at_an_edge_gives_way_to_the_whole_even_with_a_higher_score():
    part, whole = (85, 10, 99.5, 50, 0.9, 0), (5, 10, 60, 50, 0.6, 0)
    assert merge([part], [whole]) == [(85, 10, 140, 50, 0.6, 0)]


def test_a_small_object_never_removes_the_cut_box_around_it():
    # Left: cut at x = 100. The small one lies in it, seen by the same or by the other tile.
    large, small = (30, 0, 99.5, 90, 0.95, 0), (82, 40, 96, 54, 0.31, 0)
    assert merge([large, small], []) == [large, small]
    assert merge([large], [(2.5, 40, 16, 54, 0.31, 0)]) == [large, (82.5, 40, 96, 54, 0.31, 0)]


def test_detections_of_one_tile_never_remove_each_other():
    first, second = (10, 10, 30, 30, 0.9, 0), (11, 10, 30, 30, 0.8, 0)  # IoU 0.95
    assert merge([first, second], []) == [first, second]
    parts = [(60, 10, 99.5, 50, 0.9, 0), (70, 20, 99.5, 40, 0.8, 0)]  # both cut
    assert merge(parts, []) == parts


@pytest.mark.parametrize(
    ("extent", "width"),
    # Tiles of 1000 pixels begin at 0 and 800, or at 0, 800 and 1600 (or 700 and 1400).
    [((750, 1050), 1800), ((550, 1250), 1800), ((100, 1700), 1800), ((150, 2300), 2600)],
)
@pytest.mark.parametrize("axis", [0, 1])
def test_an_object_that_no_tile_sees_as_a_whole_is_one_box(extent, width, axis):
    box = np.array([extent[0], 100, extent[1], 200], np.float32)
    size = (1000, width)
    if axis:
        box, size = box[[1, 0, 3, 2]], size[::-1]
    boxes, scores, _ = merge_tiles(*seen(box[None], size), size)
    assert boxes.tolist() == [box.tolist()]
    assert scores.tolist() == pytest.approx([0.9])


def seen(boxes, size, side=1000):
    """Tiles and what each of them sees of the objects; the first tile is the surest."""
    tiles, found = make_tiles(*size, side), []
    for number, tile in enumerate(tiles):
        low, high = np.array(tile[:2] * 2, np.float32), np.array(tile[2:] * 2, np.float32)
        clipped = boxes.clip(low, high) - low
        clipped = clipped[(clipped[:, 2:] > clipped[:, :2]).all(axis=1)]
        scores = np.full(len(clipped), 0.9 - 0.01 * number, np.float32)
        found.append((clipped, scores, np.zeros(len(clipped), int)))
    return tiles, found


def test_an_object_over_four_tiles_is_one_box():
    box = np.array([[300, 400, 1500, 1600]], np.float32)
    assert merge_tiles(*seen(box, (1800, 1800)), (1800, 1800))[0].tolist() == box.tolist()


def test_long_neighbors_are_joined_each_with_its_own_parts():
    boxes = np.array([[300, 100, 1500, 200], [320, 150, 1480, 250]], np.float32)  # extents agree
    merged = merge_tiles(*seen(boxes, (1000, 1800)), (1000, 1800))[0]
    assert sorted(merged.tolist()) == boxes.tolist()


def test_parts_that_are_of_two_objects_are_not_joined():
    # Each ends within what the tiles share (80 to 100), so a neighbor would see it as a whole.
    assert len(merge([(90, 10, 100, 50, 0.9, 0)], [(0, 10, 10, 50, 0.8, 0)])) == 2
    # Other rows, other classes.
    assert len(merge([(40, 10, 100, 50, 0.9, 0)], [(0, 55, 60, 95, 0.8, 0)])) == 2
    assert len(merge([(40, 10, 100, 50, 0.9, 0)], [(0, 10, 60, 50, 0.8, 1)])) == 2


def test_neighbors_on_both_sides_of_an_edge_are_no_parts_of_one_object():
    # Tiles that share nothing; boxes within 1 % of the side from the edge, 8 pixels apart.
    tiles = make_tiles(640, 1280, 640, overlap=0.0)
    left = detections((616, 10, 636, 30, 0.9, 0))
    right = detections((4, 10, 24, 30, 0.8, 0))
    assert len(merge_tiles(tiles, [left, right], (640, 1280))[0]) == 2
    left, right = detections((616, 10, 640, 30, 0.9, 0)), detections((0, 10, 24, 30, 0.8, 0))
    boxes = merge_tiles(tiles, [left, right], (640, 1280))[0]
    assert boxes.tolist() == [[616, 10, 664, 30]]


def test_a_part_that_the_model_repeats_in_a_tile_is_no_further_object():
    size, box = (1000, 1800), np.array([[300, 100, 1500, 400]], np.float32)
    tiles, (first, (parts, scores, labels)) = seen(box, size)
    repeated = np.concatenate([parts, parts + np.float32([[0, 5, -8, -5]])])
    second = repeated, np.append(scores, np.float32(0.6)), np.append(labels, 0)
    boxes, scores, _ = merge_tiles(tiles, [first, second], size)
    assert boxes.tolist() == box.tolist()
    assert scores.tolist() == pytest.approx([0.9])


def test_thousands_of_small_objects_in_hundreds_of_tiles_are_found_once():
    generator = np.random.default_rng(0)
    size = (2000, 2000)
    corners = generator.uniform(0, 1980, (2000, 2)).astype(np.float32)
    boxes = np.concatenate([corners, corners + generator.uniform(5, 19, (2000, 2))], axis=1)
    tiles, found = seen(boxes.astype(np.float32), size, side=100)
    merged = merge_tiles(tiles, found, size)[0]
    # No object is larger than the overlap, so each is whole in a tile: all are found.
    near = (np.abs(merged[:, None] - boxes[None]) < 1e-3).all(axis=-1)
    distinct = ~((overlaps(boxes, boxes) > 0.5) & ~np.eye(len(boxes), dtype=bool)).any(axis=1)
    assert near.any(axis=0)[distinct].all()
    assert len(merged) < 1.01 * len(boxes)  # parts of an object that a better one removed stay


def overlaps(a, b):
    corner = np.maximum(a[:, None, :2], b[None, :, :2])
    shared = (np.minimum(a[:, None, 2:], b[None, :, 2:]) - corner).clip(min=0).prod(axis=-1)
    areas = [(x[:, 2:] - x[:, :2]).prod(axis=1) for x in (a, b)]
    return shared / (areas[0][:, None] + areas[1][None] - shared)


def test_small_objects_within_large_ones_stay_where_no_edge_cuts_them():
    small, large = (20, 20, 30, 30, 0.9, 0), (10, 10, 70, 70, 0.8, 0)
    assert len(merge([small, large], [])) == 2


def test_images_without_detections_give_none():
    assert merge([], []) == []
