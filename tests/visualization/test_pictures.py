import json
import os
import warnings
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

from dsrcnn.analysis.images import save_image
from dsrcnn.errors import DataError
from dsrcnn.visualization import draw, fonts
from dsrcnn.visualization.curves import draw_curves, plot_metrics, read_metrics
from dsrcnn.visualization.draw import (
    class_color,
    draw_assignment,
    draw_boxes,
    draw_proposals,
    evenly_spaced,
    hstack,
    vstack,
)
from dsrcnn.visualization.report_plots import plot_confusion, plot_curves


def test_classes_have_different_fixed_colors():
    colors = [class_color(i) for i in range(20)]
    assert len(set(colors)) == 20
    assert colors[3] == class_color(3)


def test_boxes_are_drawn_at_their_place_on_a_copy():
    image = np.zeros((400, 500, 3), np.uint8)
    drawn = draw_boxes(image, np.array([[100.0, 150, 300, 350]]), [1], ["a", "b"], [0.5])
    assert image.max() == 0
    assert drawn.shape == image.shape
    assert tuple(drawn[350, 200]) == class_color(1)
    assert drawn[250, 200].max() == 0  # the inside is unchanged
    assert np.array_equal(draw_boxes(image, np.zeros((0, 4)), [], []), image)


def test_small_images_are_enlarged_with_their_boxes():
    image = np.zeros((32, 64, 3), np.uint8)
    drawn = draw_boxes(image, np.array([[10.0, 10, 50, 30]]), [0], ["a"])
    assert drawn.shape == (320, 640, 3)
    assert tuple(drawn[200, 100]) == class_color(0)  # the left border, ten times further


def test_images_of_different_sizes_are_put_in_a_row_under_titles_or_stacked():
    images = [np.full((10, 20, 3), 50, np.uint8), np.full((30, 5, 3), 90, np.uint8)]
    row, stacked = hstack(images, ["first", "second"]), vstack(images)
    assert row.shape == (24 + 30, 20 + 6 + 5, 3)
    assert (row[24:34, :20] == 50).all()
    assert (row[24:54, 26:] == 90).all()
    assert stacked.shape == (10 + 6 + 30 + 6, 20, 3)
    assert (stacked[16:46, 5:] == 255).all()


def test_an_assignment_has_a_color_for_each_object_and_gray_for_unassigned_ones():
    image = np.full((300, 300, 3), 255, np.uint8)
    objects = np.array([[10.0, 10, 100, 100], [150, 150, 250, 250]])
    proposals = np.array([[20.0, 20, 120, 120], [200, 10, 280, 90], [-1e30, 0, np.nan, 1e30]])
    drawn = draw_assignment(image, objects, proposals, np.array([0, -1, -1]))
    assert tuple(drawn[10, 50]) == class_color(0)
    assert tuple(drawn[120, 60]) == class_color(0)
    assert tuple(drawn[150, 200]) == (128, 128, 128)
    assert (drawn[10, 200:280] == 255).all()  # background proposals are not drawn
    draw_assignment(image, objects, proposals, np.array([0, 1, 1]))  # boxes that are not finite


def test_proposals_are_drawn_at_their_place_also_outside_the_image():
    image = np.full((300, 400, 3), 255, np.uint8)
    boxes = np.array([[-20.0, -20, 420, 320], [100, 100, 200, 200], [np.nan, 0, 1e30, 5]])
    drawn = draw_proposals(image, boxes)
    assert drawn.shape == (390, 490, 3)  # a margin of 45 pixels all around
    assert tuple(drawn[25, 200]) == class_color(0)
    assert tuple(drawn[145, 200]) == class_color(1)


@pytest.mark.parametrize(("total", "count", "expected"), [
    (10, 4, [0, 3, 6, 9]), (3, 5, [0, 1, 2]), (7, 1, [0]), (0, 4, []),
])  # fmt: skip
def test_indices_are_evenly_spaced(total, count, expected):
    assert evenly_spaced(total, count) == expected


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


def test_metrics_of_a_resumed_and_truncated_run_are_read(metrics):
    entries = read_metrics(metrics)
    assert [e["iteration"] for e in entries] == [0, 20, 39, 40]
    assert entries[1]["total_loss"] == 3.0


def test_curves_have_panels_for_dla_and_dpg_if_these_were_logged(metrics, tmp_path):
    def width():
        draw_curves(metrics, tmp_path / "curves.png")
        picture = cv2.imread(str(tmp_path / "curves.png"))
        assert picture.std() > 5
        return picture.shape[1]

    widths = [width()]
    for scalars in (
        {"dla/positives": 9.0, "dla/positives_0": 4.0},
        {"dpg/tau": 9.0, "dpg/entropy": 0.5},
    ):
        with metrics.open("a") as file:
            file.write("\n" + json.dumps({"iteration": 39, **scalars}))
        widths.append(width())
    assert widths == [3 * 440, 4 * 440, 5 * 440]


def test_several_test_sets_have_a_curve_each(tmp_path):
    entries = [{"iteration": 9, "total_loss": 1.0}]
    for name, ap in (("a_test", 20.0), ("b_test", 30.0)):
        entries[0] |= {f"{name}/bbox/AP": ap, f"{name}/bbox/AP50": 2 * ap}
    (tmp_path / "metrics.json").write_text(json.dumps(entries[0]))
    figure = plot_metrics(tmp_path / "metrics.json")
    panel = next(axes for axes in figure.axes if axes.get_title() == "validation AP")
    drawn = {line.get_label(): line.get_ydata().tolist() for line in panel.lines}
    assert drawn == {"a_test/bbox/AP": [20.0], "b_test/bbox/AP": [30.0]}


@pytest.mark.parametrize("name", ["a$^$", "$5$", "_hidden", "plain"])
def test_names_of_classes_are_shown_as_they_are_in_plots(name):
    curve = SimpleNamespace(
        **{key: np.array([0.5]) for key in ("recall", "precision", "scores", "f1")},
        objects=1, best=(0.5, 0.5),
    )  # fmt: skip
    figure = plot_curves([curve], [name], 0.5)
    figure.canvas.draw()
    left = figure.axes[0].get_legend().get_texts()
    assert [text.get_text().replace("\\$", "$").strip() for text in left] == [name]
    plot_confusion(np.eye(2), [name]).canvas.draw()


BLANK = np.full((320, 400, 3), 255, np.uint8)


def label_of(name):
    """A picture of the label of one box."""
    return draw_boxes(BLANK, np.array([[20.0, 60, 200, 300]]), [0], [name])[40:60]


@pytest.fixture
def opencv_4(monkeypatch):
    """OpenCV's fonts are those of version 4."""
    caches = (fonts.image_labels, fonts.common_labels, fonts.plot_labels)
    for cache in caches:
        cache.cache_clear()
    for module in (fonts, draw):
        monkeypatch.setattr(module, "opencv_draws", str.isascii)
    yield
    for cache in caches:
        cache.cache_clear()


def test_opencv_draws_ascii_and_says_what_it_does_not_have():
    assert fonts.opencv_draws("a cell 0.5")
    assert not fonts.opencv_draws("\u0378")  # no character
    assert fonts.opencv_draws("Жук") == (int(cv2.__version__.split(".")[0]) >= 5)


@pytest.mark.usefixtures("opencv_4")
def test_names_of_other_scripts_are_drawn_on_images_by_a_font_of_the_machine():
    (label,) = fonts.image_labels(("Жук",))
    assert label == ("Жук", ("DejaVu Sans", font_manager.findfont("DejaVu Sans")))
    image = Image.new("RGB", (400, 320), "white")
    face = ImageFont.truetype(label.font.path, 12)
    ImageDraw.Draw(image).text((21, 57), "Жук", (0, 0, 0), face, anchor="ls")
    expected = np.asarray(image)[40:60]
    drawn = label_of("Жук")
    # The text is that of the font, on the color of its box.
    letters = (expected < 40).all(2)
    assert letters.sum() > 20
    assert (drawn[letters] < 60).all()
    title = hstack([BLANK], ["Жук"])
    assert not np.array_equal(title, hstack([BLANK], ["Жар"]))


def test_titles_may_have_bytes_that_are_no_character():
    title = os.fsdecode(b"m\xfcll.jpg")  # of an archive from Windows; OpenCV 5 crashed
    assert np.array_equal(hstack([BLANK], [title]), hstack([BLANK], ["m?ll.jpg"]))


@pytest.mark.usefixtures("opencv_4")
def test_names_that_no_font_has_are_drawn_as_numbers_with_one_warning(caplog):
    names = ("a", "\u0378", "Жук", "\u0379")  # the second and the last are no characters
    assert [label.text for label in fonts.image_labels(names)] == ["a", "class 1", "Жук", "class 3"]
    assert caplog.text.count("No font of this machine shows") == 1
    assert repr(names[1]) in caplog.text
    assert np.array_equal(label_of("\u0378"), label_of("class 0"))
    texts, font = fonts.common_labels(names)
    assert texts == ["a", "class 1", "Жук", "class 3"]
    assert font.family == "DejaVu Sans"
    assert fonts.common_labels(("a", "b")) == (["a", "b"], None)
    assert fonts.plot_labels(names, "image")[0] == ["a", "image 1", "Жук", "image 3"]
    assert "shows the image names" in caplog.text


def test_fonts_are_regular_ones_before_bold_ones_and_never_placeholders(monkeypatch):
    entry = SimpleNamespace
    files = [
        entry(name="Noto Sans", fname="/a-Bold.ttc", style="normal", weight=700),
        entry(name="Noto Sans", fname="/b-Regular.ttc", style="normal", weight=400),
        entry(name="Noto Sans", fname="/a-Italic.ttc", style="italic", weight="normal"),
        entry(name="Serif", fname="/a-Regular.ttc", style="normal", weight="regular"),
        entry(name=".LastResort", fname="/LastResort.otf", style="normal", weight=400),
    ]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", files)
    found = [font.path for font in fonts._fonts.__wrapped__()]
    assert found[1:] == ["/b-Regular.ttc", "/a-Bold.ttc", "/a-Italic.ttc", "/a-Regular.ttc"]


def test_plots_use_a_font_for_every_name():
    figure = plot_confusion(np.eye(4), ["Жук", "bee", "\u0378"])
    labels = figure.axes[0].get_xticklabels()
    assert [text.get_text() for text in labels] == ["Жук", "bee", "class 2", "missed"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of missing glyphs
        figure.canvas.draw()


def test_a_picture_that_its_format_does_not_take_is_one_message(tmp_path):
    with pytest.raises(DataError, match=r"70000x1 pixels cannot be written as .jpg"):
        save_image(tmp_path / "wide.jpg", np.zeros((1, 70_000, 3), np.uint8))
    assert not list(tmp_path.iterdir())
