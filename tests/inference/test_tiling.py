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


def test_a_part_in_each_tile_is_one_detection_if_one_part_covers_the_other():
    # An object from x = 70 to 120: 30 pixels of it left, 40 right; 20 in both.
    left, right = (70, 10, 100, 50, 0.9, 0), (0, 10, 40, 50, 0.8, 0)
    assert merge([left], [right]) == [left]


def test_small_objects_within_large_ones_stay_where_no_edge_cuts_them():
    small, large = (20, 20, 30, 30, 0.9, 0), (10, 10, 70, 70, 0.8, 0)
    assert len(merge([small, large], [])) == 2


def test_images_without_detections_give_none():
    assert merge([], []) == []
