"""Videos, cameras and live streams."""

import gc
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import gray_frames, write_clip
from PIL import Image

from dsrcnn.errors import ConfigError, DataError
from dsrcnn.inference import videos
from dsrcnn.inference.results import Result
from dsrcnn.inference.saving import VideoWriter
from dsrcnn.inference.sources import has_live, is_single, readers, source_files
from dsrcnn.inference.videos import VideoInfo, is_live, is_video, video_info


def frames(source):
    return [reader() for reader in readers(source)]


@pytest.fixture
def video(tmp_path):
    """Seven frames of growing brightness."""
    return write_clip(tmp_path / "clip.mkv", gray_frames(range(0, 210, 30)), fps=5)


def test_videos_give_their_frames(video):
    assert not is_single(video)
    decoded = frames(video)
    assert [f.number for f in decoded] == list(range(7))
    assert decoded[3].path == video
    for i, frame in enumerate(decoded):
        assert abs(frame.image.mean() - 30 * i) < 3
    assert video_info(video) == (64, 48, 7, 5.0)


def test_patterns_of_videos_and_folders_named_like_videos_are_read(video, tmp_path):
    pattern, folder = f"{tmp_path}/*.mkv", tmp_path / "clips.mov"
    folder.mkdir()
    Image.new("RGB", (4, 3)).save(folder / "a.png")
    assert source_files(pattern) == [video]
    assert [f.number for f in frames(pattern)] == list(range(7))
    assert source_files(str(folder)) == [f.path for f in frames(folder)] == [f"{folder}/a.png"]
    assert not is_single("rtsp://host/stream?list=[1]")
    assert source_files("rtsp://host/stream?list=[1]") == ["rtsp://host/stream?list=[1]"]


def test_a_video_that_is_cut_short_gives_what_it_has_with_a_warning(video, caplog):
    content = Path(video).read_bytes()
    Path(video).write_bytes(content[: len(content) * 2 // 3])
    decoded = frames(video)
    assert 0 < len(decoded) < 7
    assert f"{video} ends after {len(decoded)} of the 7 frames of its header" in caplog.text


def test_a_header_may_count_or_estimate_a_few_frames_more(video, monkeypatch, caplog):
    for expected, is_told in ((8, False), (9, True)):
        info = VideoInfo(64, 48, expected, 5.0)
        monkeypatch.setattr(videos, "video_info", lambda path, info=info: info)
        assert len(frames(video)) == 7
        assert ("was trimmed" in caplog.text) == is_told


def test_files_that_are_no_videos_and_absent_cameras_are_refused(tmp_path):
    path = tmp_path / "text.mp4"
    path.write_text("no video")
    with pytest.raises(DataError, match=r"text.mp4 cannot be opened; the file is damaged"):
        frames(path)
    with pytest.raises(DataError, match="Camera 97 cannot be opened"):
        frames(97)
    with pytest.raises(DataError, match=r"Stream rtsp://127\.0\.0\.1:9/a cannot be opened\. Check"):
        frames("rtsp://127.0.0.1:9/a")


@pytest.mark.parametrize("spelling", [
    "rtsp://h/1", "RTSP://h/1", "rtsps://h/1?list=[1]", "srt://h:1", "udp://@:1", "/dev/video0",
    "http://h/live.m3u8?token=1",
])  # fmt: skip
def test_cameras_and_streams_are_live(spelling, detector):
    for source in (spelling, [spelling, 0]):
        with pytest.raises(ConfigError, match="A camera or stream has no end; write stream=True"):
            detector.predict(source)
    assert not is_single(spelling)


def test_addresses_of_files_are_no_streams():
    assert is_video("http://h/clip.MP4?token=1")
    assert not is_live("http://h/clip.mp4?token=1")
    assert not is_live("clip.mp4")
    assert not is_live(True)


class Camera:
    """Gives frames whose gray value is their number, up to 40."""

    started, rate = 0, 20  # connections, frames a second

    def __init__(self, source):
        Camera.started += 1
        self.start, self.last = time.monotonic(), -1

    def isOpened(self):  # noqa: N802
        return True

    def read(self):
        self.last += 1
        if self.last == 40:
            return False, None
        time.sleep(max(self.start + self.last / self.rate - time.monotonic(), 0))
        return True, np.full((48, 64, 3), self.last, np.uint8)

    def get(self, key):
        return 0.0

    def release(self):
        pass


def test_each_connection_to_a_camera_is_a_recording(tmp_path, monkeypatch):
    writer = VideoWriter(tmp_path)
    monkeypatch.setattr("dsrcnn.inference.saving._drawn", lambda result: result.image)
    for value in (50, 200):
        for number in range(3):
            empty = np.zeros((0, 4)), np.zeros(0), np.zeros(0, int)
            image = np.full((48, 64, 3), value, np.uint8)
            seconds = number / 5
            writer.write(
                Result(*empty, ["a"], (48, 64), "rtsp://h/1", number, seconds=seconds, _image=image)
            )
    first, second = writer.close()
    assert first != second
    for path, value in ((first, 50), (second, 200)):
        values = [round(float(frame.image.mean())) for frame in frames(path)]
        assert values == pytest.approx([value] * 11, abs=4)


def test_cameras_in_iterators_are_reported(detector, caplog):
    def sources():
        yield np.zeros((48, 64, 3), np.uint8)
        yield 0

    assert len(detector.predict(sources())) == 1
    (error,) = detector.skipped
    assert "The source 0 comes from an iterator; give cameras and streams alone" in str(error)
    assert has_live([[0]])


def test_cameras_that_a_pattern_matches_are_live(monkeypatch):
    monkeypatch.setattr("glob.glob", lambda *_, **__: ["/dev/video0"])
    monkeypatch.setattr(cv2, "VideoCapture", Camera)
    assert has_live("/dev/video*")
    todo = readers("/dev/video*")
    assert next(todo)().seconds == 0
    todo.close()


@pytest.mark.parametrize("on_cpu", [True, False])
def test_a_result_of_a_camera_does_not_wait_for_the_next_frame(detector, on_cpu, monkeypatch):
    monkeypatch.setattr(cv2, "VideoCapture", Camera)
    monkeypatch.setattr(Camera, "rate", 2)
    monkeypatch.setattr(detector, "on_cpu", on_cpu)
    start = time.monotonic()
    for result in detector.predict(0, stream=True):
        assert time.monotonic() - start - result.seconds < 0.4  # frames come every half second
        if result.frame == 2:
            break


@pytest.mark.parametrize("on_cpu", [True, False])
def test_an_error_of_the_model_closes_the_camera(detector, on_cpu, monkeypatch):
    monkeypatch.setattr(cv2, "VideoCapture", Camera)
    monkeypatch.setattr(detector, "on_cpu", on_cpu)
    monkeypatch.setattr(detector, "_detect", lambda *_: 1 / 0)
    gc.disable()
    try:
        with pytest.raises(ZeroDivisionError) as kept:
            list(detector.predict(0, stream=True))
        end = time.monotonic() + 5
        while time.monotonic() < end and any(
            t.name == "dsrcnn-camera" for t in threading.enumerate()
        ):
            time.sleep(0.05)
        assert time.monotonic() < end
        assert kept.value
    finally:
        gc.enable()


@pytest.mark.parametrize("source", [0, "rtsp://camera/1"])
def test_a_slow_consumer_sees_the_newest_frame_of_one_connection(source, monkeypatch, caplog):
    monkeypatch.setattr(cv2, "VideoCapture", Camera)
    monkeypatch.setattr(Camera, "started", 0)
    start, seen = time.monotonic(), []
    for reader in readers(source):
        frame = reader()
        seen.append(frame)
        age = time.monotonic() - start - frame.image.mean() / 20
        assert age < 1  # reading all in turn would lag by 6 seconds
        assert frame.seconds == pytest.approx(frame.image.mean() / 20, abs=0.3)
        time.sleep(0.2)
    assert [frame.number for frame in seen] == list(range(len(seen)))
    assert 3 < len(seen) < 20  # of 40; the others were dropped
    assert Camera.started == 1
    assert "has ended." in caplog.text


def test_the_recording_of_a_camera_plays_as_fast_as_things_happened(tmp_path, monkeypatch):
    writer = VideoWriter(tmp_path)
    monkeypatch.setattr("dsrcnn.inference.saving._drawn", lambda result: result.image)
    for number, (seconds, value) in enumerate([(0.0, 50), (0.4, 120), (1.2, 200)]):
        empty = np.zeros((0, 4)), np.zeros(0), np.zeros(0, int)
        image = np.full((48, 64, 3), value, np.uint8)
        writer.write(Result(*empty, ["a"], (48, 64), None, number, seconds=seconds, _image=image))
    (path,) = writer.close()
    values = [round(float(frame.image.mean())) for frame in frames(path)]
    assert video_info(str(path)).fps == 25
    expected = [50] * 10 + [120] * 20 + [200]
    assert values == pytest.approx(expected, abs=4)


@pytest.mark.parametrize("has_logging", [True, False])
def test_videos_are_opened_with_any_version_of_opencv(video, has_logging, monkeypatch):
    levels = []
    place = cv2.utils.logging if has_logging else cv2  # before and from OpenCV 4.13 on
    if not has_logging:
        monkeypatch.delattr(cv2.utils, "logging")
    monkeypatch.setattr(place, "getLogLevel", lambda: 3, raising=False)
    monkeypatch.setattr(place, "setLogLevel", levels.append, raising=False)
    assert len(frames(video)) == 7
    assert levels == [0, 3] * 2
    monkeypatch.delattr(place, "setLogLevel")
    assert len(frames(video)) == 7
