"""Results: conversion to other libraries, pictures, and what is kept in memory."""

import numpy as np
import pytest
from PIL import Image

from dsrcnn.errors import DataError, MissingPackageError
from dsrcnn.inference import Result, StageDetections
from dsrcnn.visualization import fonts

BOXES = np.array([[10, 20, 40, 60], [0, 0, 30.5, 20]], np.float32)


def result(**changes):
    parts = {"boxes": BOXES, "scores": np.array([0.9, 0.5], np.float32)}
    parts |= {"labels": np.array([1, 0]), "classes": ["cell", "plate"], "size": (80, 100)}
    return Result(**{**parts, **changes})


def test_names_and_length_are_those_of_the_detections():
    assert len(result()) == 2
    assert result().names == ["plate", "cell"]


def test_coco_entries_have_widths_and_the_ids_that_are_given():
    first, second = result().to_coco(7)
    score = float(np.float32(0.9))  # not rounded: equal scores would have an order by chance
    assert first == {"image_id": 7, "category_id": 2, "bbox": [10, 20, 30, 40], "score": score}
    assert second["bbox"] == [0, 0, 30.5, 20]
    assert [e["category_id"] for e in result().to_coco("a", [30, "x"])] == ["x", 30]


def test_supervision_gets_the_same_detections():
    detections = result().to_supervision()
    np.testing.assert_array_equal(detections.xyxy, BOXES)
    assert detections.confidence.tolist() == pytest.approx([0.9, 0.5])
    assert detections.class_id.tolist() == [1, 0]
    assert detections["class_name"].tolist() == ["plate", "cell"]
    empty = result(boxes=np.zeros((0, 4), np.float32), scores=np.zeros(0), labels=np.zeros(0, int))
    assert len(empty.to_supervision()) == 0


def test_instances_are_detectron2s():
    instances = result().to_instances()
    assert instances.image_size == (80, 100)
    np.testing.assert_array_equal(instances.pred_boxes.tensor.numpy(), BOXES)
    assert instances.pred_classes.tolist() == [1, 0]


def test_dictionaries_and_data_frames_have_a_row_for_each_detection():
    rows = result(path="a.jpg").to_dict()
    assert rows[0] == {
        "path": "a.jpg", "frame": None, "name": "plate", "label": 1, "score": pytest.approx(0.9),
        "x1": 10, "y1": 20, "x2": 40, "y2": 60,
    }  # fmt: skip
    pandas = pytest.importorskip("pandas")
    assert isinstance(result().to_pandas(), pandas.DataFrame)
    assert list(result().to_pandas()["name"]) == ["plate", "cell"]


def test_pictures_show_boxes_on_the_image_in_memory_or_of_the_file(tmp_path):
    pixels = np.full((80, 100, 3), 128, np.uint8)
    picture = result(_image=pixels).plot()
    assert picture.size == (100, 80)
    assert np.asarray(picture)[55, 10].tolist() != [128] * 3
    assert (pixels == 128).all()
    Image.fromarray(pixels).save(tmp_path / "a.png")
    of_file = result(path=str(tmp_path / "a.png"))
    assert np.array_equal(np.asarray(of_file.plot()), np.asarray(picture))
    saved = of_file.save(tmp_path / "new" / "b.png")
    assert np.array_equal(np.asarray(Image.open(saved)), np.asarray(picture))


@pytest.mark.parametrize("side", [8, 200])
def test_names_of_other_scripts_are_drawn(side, monkeypatch):
    monkeypatch.setattr(fonts, "opencv_draws", str.isascii)  # as in version 4
    fonts.common_labels.cache_clear()
    image = np.full((side, side, 3), 99, np.uint8)
    names = (["Жук", "Лис"], ["Жар", "Лис"], ["\u0378", "Лис"])
    pictures = [np.asarray(result(_image=image, classes=classes).plot()) for classes in names]
    fonts.common_labels.cache_clear()
    assert side == 8 or not np.array_equal(pictures[0], pictures[1])
    assert side == 8 or not np.array_equal(pictures[0], pictures[2])


def test_the_detections_of_a_stage_are_a_result_if_there_are_stages():
    stage = StageDetections(BOXES[:1] + 15, np.array([0.4]), np.array([0]))
    with_stages = result(stages=[stage])
    first = with_stages.at_stage(0)
    assert (first.boxes, first.scores, first.labels) == (stage.boxes, stage.scores, stage.labels)
    assert first.size == with_stages.size
    with pytest.raises(DataError, match="has no stage 1; write one from 0 to 0"):
        with_stages.at_stage(1)
    with pytest.raises(DataError, match="has no stages; write predict"):
        result().at_stage(0)


def test_a_threshold_holds_for_the_result_and_its_stages():
    whole = result(stages=[StageDetections(BOXES, np.array([0.2, 0.6]), np.array([1, 0]))])
    best = whole.above(float(whole.scores[0]))
    assert best.scores.tolist() == [whole.scores[0]]
    assert best.boxes.tolist() == whole.boxes[:1].tolist()
    assert best.labels.tolist() == whole.labels[:1].tolist()
    assert whole.above(0.6).at_stage(0).boxes.tolist() == BOXES[1:].tolist()
    assert len(whole) == 2


def test_pictures_that_cannot_be_drawn_or_written_are_one_error(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="frames of a video are kept with stream=True only"):
        result(path="clip.mp4", frame=3).plot()
    with pytest.raises(DataError, match=r"gone.jpg does not exist"):
        result(path="gone.jpg").plot()
    drawn = result(_image=np.zeros((80, 100, 3), np.uint8))
    with pytest.raises(DataError, match="cannot be written"):
        drawn.save(tmp_path / "picture.unknown")
    monkeypatch.setitem(__import__("sys").modules, "supervision", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'dsrcnn\[predict\]'"):
        drawn.plot()
