"""Views of the page: detections by stage and threshold, assignments, videos."""

import cv2
import numpy as np
import pytest
from conftest import gray_frames, write_clip
from pages import assignment_view

from dsrcnn.app.views import (
    AssignmentView,
    count_stages,
    detect,
    detect_video,
    show,
    show_assignment,
)
from dsrcnn.errors import ConfigError, DataError
from dsrcnn.inference import Result

FRAMES = gray_frames(range(0, 240, 40), height=64, width=96)


def test_every_stage_is_counted_and_can_be_shown(detector, photos):
    assert count_stages(detector) == 2
    result = detect(detector, str(photos / "a.png"))
    first, last = (show(result, 0, stage) for stage in (1, 2))
    assert not np.array_equal(first.picture, last.picture)
    assert first.rows != last.rows
    expected = detector.predict(photos / "a.png", threshold=0)
    assert [row[0] for row in last.rows] == expected.names
    np.testing.assert_allclose([row[1] for row in last.rows], expected.scores, atol=6e-4)
    np.testing.assert_allclose([row[2:] for row in last.rows], expected.boxes, atol=0.06)


def test_a_threshold_leaves_those_that_a_prediction_with_it_has(detector, photos):
    result = detect(detector, str(photos / "a.png"))
    threshold = float(np.median(result.scores))
    expected = detector.predict(photos / "a.png", threshold=threshold)
    shown = show(result, threshold, 2)
    assert 0 < len(shown.rows) == len(expected) < len(result)
    height, width = expected.size
    assert shown.summary.startswith(f"{len(expected)} detections in {width} x {height} pixels: ")
    assert show(result, 1, 2).summary == f"0 detections in {width} x {height} pixels"
    assert show(result, 1, 2).rows == []


def test_a_picture_larger_than_browsers_show_is_shrunk():
    image = np.zeros((20, 70_000, 3), np.uint8)
    none = np.zeros((0, 4)), np.zeros(0), np.zeros(0, int)
    wide = Result(*none, ["a"], image.shape[:2], _image=image)
    shown = show(wide, 0.3, 1)
    assert shown.picture.shape == (5, 16_000, 3)
    assert "70000 x 20 pixels" in shown.summary


def test_assignments_are_one_to_one_or_those_of_dla(detector, tmp_path):
    view = assignment_view(detector, tmp_path)
    assert view.names == ["1. 1.jpg", "2. 2.jpg"]
    assert [path.rpartition("/")[2] for path in view.paths] == ["1.jpg", "2.jpg"]
    assignments = view.assign("2. 2.jpg")
    picture, text = show_assignment(assignments, "Hungarian", 1)
    assert text == "2 proposals for 2 objects at stage 1 (1.0 each)"
    assert min(picture.shape[:2]) >= 480
    assert picture.dtype == np.uint8
    counts = [assignments.positives("DLA", index) for index in range(2)]
    assert show_assignment(assignments, "DLA", 2)[1].startswith(f"{counts[1]} proposals")


def test_models_without_a_cascade_have_no_view_of_assignments(detector, tmp_path):
    cfg = detector.cfg.clone()
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    with pytest.raises(ConfigError, match="The assignment view needs SparseRCNN"):
        AssignmentView(detector, cfg)


def test_a_video_becomes_one_that_browsers_play(detector, tmp_path):
    clip, output = write_clip(tmp_path / "clip.mp4", FRAMES), tmp_path / "out.webm"
    *progress, (path, text) = detect_video(detector, clip, 0, output)
    assert all(done is None for done, _ in progress)
    assert path == output
    assert text.startswith("6 frames, ")
    assert output.read_bytes()[:4] == bytes.fromhex("1a45dfa3")  # EBML, as in WebM
    capture = cv2.VideoCapture(str(output))
    frames = [capture.read()[1] for _ in range(6)]
    assert frames[5].shape == (64, 96, 3)
    assert np.ptp(frames[2]) > 100  # boxes on a plain frame


def test_videos_that_cannot_be_read_are_one_error(detector, tmp_path):
    (tmp_path / "a.mp4").write_text("no video")
    for name, message in (("a.mp4", "cannot be opened"), ("a.txt", "upload an MP4 or WebM")):
        with pytest.raises(DataError, match=message):
            list(detect_video(detector, str(tmp_path / name), 0, tmp_path / "out.webm"))
