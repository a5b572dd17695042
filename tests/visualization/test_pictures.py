import json

import cv2
import numpy as np
import pytest

from dsrcnn.visualization import draw_boxes, draw_curves, side_by_side
from dsrcnn.visualization.curves import read_metrics
from dsrcnn.visualization.draw import class_colour


def test_classes_have_different_fixed_colours():
    colours = [class_colour(i) for i in range(20)]
    assert len(set(colours)) == 20
    assert colours[3] == class_colour(3)


def test_boxes_are_drawn_where_they_are_on_a_copy():
    image = np.zeros((400, 500, 3), np.uint8)
    drawn = draw_boxes(image, np.array([[100.0, 150, 300, 350]]), [1], ["a", "b"], [0.5])
    assert image.max() == 0
    assert drawn.shape == image.shape
    assert tuple(drawn[350, 200]) == class_colour(1)
    assert drawn[250, 200].max() == 0  # the inside stays as it was


def test_small_images_are_enlarged_with_their_boxes():
    image = np.zeros((32, 64, 3), np.uint8)
    drawn = draw_boxes(image, np.array([[10.0, 10, 50, 30]]), [0], ["a"], min_side=320)
    assert drawn.shape == (320, 640, 3)
    assert tuple(drawn[200, 100]) == class_colour(0)  # the left border, ten times further


def test_an_image_without_boxes_is_drawn():
    image = np.full((400, 400, 3), 9, np.uint8)
    assert np.array_equal(draw_boxes(image, np.zeros((0, 4)), [], []), image)


def test_a_sheet_holds_all_images_under_their_titles():
    images = [np.full((10, 20, 3), 50, np.uint8), np.full((30, 5, 3), 90, np.uint8)]
    sheet = side_by_side(images, ["first", "second"])
    assert sheet.shape[1] == 20 + 5 + 6
    assert (sheet == 50).sum() >= images[0].size  # a few pixels of the titles have it too
    assert (sheet == 90).sum() >= images[1].size


@pytest.fixture
def metrics(tmp_path):
    lines = [
        {"iteration": 0, "total_loss": 5.0, "lr": 0.1},
        {"iteration": 20, "total_loss": 4.0, "lr": 0.1},
        {"iteration": 40, "total_loss": 9.0},
        {"iteration": 20, "total_loss": 3.0},  # resumed from iteration 20
        {"iteration": 39, "bbox/AP": 7.0, "bbox/AP50": float("nan")},
    ]
    path = tmp_path / "metrics.json"
    path.write_text("\n".join(map(json.dumps, lines)) + '\n{"iteration": 60, "tot')
    return path


def test_metrics_of_a_resumed_and_cut_off_run_are_read(metrics):
    entries = read_metrics(metrics)
    assert [e["iteration"] for e in entries] == [0, 20, 39, 40]
    assert entries[1]["total_loss"] == 3.0


def test_curves_are_written_as_a_picture(metrics, tmp_path):
    draw_curves(metrics, tmp_path / "curves.png")
    picture = cv2.imread(str(tmp_path / "curves.png"))
    assert picture.shape[1] > 1000
    assert picture.std() > 5
