import json

import cv2
import numpy as np
import pytest

from dsrcnn.analysis.proposals import draw_expert_weights
from dsrcnn.visualization import (
    draw_assignment,
    draw_boxes,
    draw_curves,
    draw_proposals,
    one_below_the_other,
    side_by_side,
)
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


def test_an_assignment_shows_learners_in_the_colour_of_their_object_and_the_unmatched_in_grey():
    image = np.full((300, 300, 3), 255, np.uint8)
    objects = np.array([[10.0, 10, 100, 100], [150, 150, 250, 250]])
    proposals = np.array([[20.0, 20, 120, 120], [200, 10, 280, 90], [-1e30, 0, np.nan, 1e30]])
    drawn = draw_assignment(image, objects, proposals, np.array([0, -1, -1]))
    assert tuple(drawn[10, 50]) == class_colour(0)
    assert tuple(drawn[120, 60]) == class_colour(0)
    assert tuple(drawn[150, 200]) == (128, 128, 128)
    assert (drawn[10, 200:280] == 255).all()  # the background proposal is left out
    draw_assignment(image, objects, proposals, np.array([0, 1, 1]))  # wild boxes do no harm


def test_sheets_of_different_widths_are_stacked():
    sheets = [np.zeros((10, 20, 3), np.uint8), np.zeros((5, 8, 3), np.uint8)]
    stacked = one_below_the_other(sheets)
    assert stacked.shape == (10 + 6 + 5 + 6, 20, 3)
    assert (stacked[16:21, 8:] == 255).all()


def test_curves_of_dla_show_the_positives_as_well(metrics, tmp_path):
    draw_curves(metrics, tmp_path / "plain.png")
    with metrics.open("a") as file:
        file.write("\n")
        for iteration in (19, 39):
            entry = {"iteration": iteration, "dla/positives": 9.0, "dla/positives_0": 4.0}
            file.write(json.dumps(entry) + "\n")
    draw_curves(metrics, tmp_path / "dla.png")
    with metrics.open("a") as file:
        file.write(json.dumps({"iteration": 39, "dpg/tau": 9.0, "dpg/entropy": 0.5}) + "\n")
    draw_curves(metrics, tmp_path / "both.png")
    names = ("plain.png", "dla.png", "both.png")
    widths = [cv2.imread(str(tmp_path / n)).shape[1] for n in names]
    assert widths[2] > widths[1] > widths[0]


def test_proposals_are_drawn_where_they_are_also_beyond_the_image():
    image = np.full((300, 400, 3), 255, np.uint8)
    boxes = np.array([[-20.0, -20, 420, 320], [100, 100, 200, 200], [np.nan, 0, 1e30, 5]])
    drawn = draw_proposals(image, boxes)
    assert drawn.shape == (390, 490, 3)  # a margin of 45 pixels all around
    assert tuple(drawn[25, 200]) == class_colour(0)
    assert tuple(drawn[145, 200]) == class_colour(1)


def test_weights_of_every_image_have_a_heat_map():
    weights = np.random.default_rng(0).dirichlet([1, 1, 1], (2, 9)).transpose(0, 2, 1)
    one, two = (draw_expert_weights(weights[:n], ["a", "b"][:n]) for n in (1, 2))
    assert one.shape[1] == two.shape[1]
    assert two.shape[0] > one.shape[0]
    assert two.std() > 10
