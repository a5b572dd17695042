"""Decoding of videos, cameras and live streams."""

import logging
import os
import re
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import cv2
import numpy as np

from ..errors import DataError
from .batching import iterate_ahead

_LOGGER = logging.getLogger(__name__)

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".ts")
_LIVE_SUFFIXES = (".m3u8", ".mjpg", ".mjpeg")  # of addresses
_LIVE = ("rtsp", "rtsps", "rtmp", "rtmps", "rtp", "srt", "udp", "tcp", "mms")
_LOST = 0.02  # of the frames of a healthy file: some headers only estimate their number
_PATIENCE = 2.0  # seconds to wait for a camera that is being closed


class VideoFrame(NamedTuple):
    """An image (H, W, 3) uint8 RGB, and for cameras and streams the seconds since the first."""

    image: np.ndarray
    seconds: float | None = None


class VideoInfo(NamedTuple):
    """Size of a video.

    Attributes:
        frames: by the file's header, 0 if unknown.
        fps: frames per second.
    """

    width: int
    height: int
    frames: int
    fps: float


def is_live(source: Any) -> bool:
    """Whether a source shows what is happening now: a camera, by number or file, or a stream."""
    if not isinstance(source, (str, os.PathLike)):
        return isinstance(source, int) and not isinstance(source, bool)
    path = os.fspath(source)
    if "://" not in str(path):
        return re.fullmatch(r"/dev/video\d+", str(path)) is not None
    return _protocol(path) in _LIVE or _path_of(path).endswith(_LIVE_SUFFIXES)


def is_video(path: str) -> bool:
    """Whether a path or address is that of a video or stream, by its ending or protocol."""
    return _path_of(path).endswith(VIDEO_SUFFIXES) or is_live(path)


def _protocol(address: str) -> str:
    return address.partition("://")[0].lower()


def _path_of(path: str) -> str:
    """Path in lower case; of an address without what follows it."""
    if "://" not in path:
        return path.lower()
    try:
        return urlsplit(path).path.lower()
    except ValueError:  # no address
        return path.lower()


def video_info(path: str | int) -> VideoInfo:
    """Read the header of a video, or ask a camera.

    Raises:
        DataError: if it cannot be opened.
    """
    capture = _open(path)
    try:
        keys = (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT, cv2.CAP_PROP_FRAME_COUNT)
        width, height, frames = (int(capture.get(key)) for key in keys)
        fps = capture.get(cv2.CAP_PROP_FPS)
        return VideoInfo(width, height, max(frames, 0), fps if 0 < fps < 1000 else 25.0)
    finally:
        capture.release()


def decode(path: str) -> Generator[VideoFrame, None, None]:
    """Decode a video file in a thread, a few frames ahead.

    Raises:
        DataError: if it cannot be opened or has no frame.
    """
    expected = video_info(path).frames
    number = 0
    with closing(iterate_ahead(_images(path), ahead=4)) as images:
        for image in images:
            yield VideoFrame(image)
            number += 1
    if not number:
        raise DataError(f"Video {path} has no frame that can be decoded.")
    if expected - number > max(1, _LOST * expected):
        # No error: headers count the frames that a trimmed file hides.
        _LOGGER.warning(
            "Video %s ends after %d of the %d frames of its header: it is damaged, or was trimmed "
            "without being encoded again.", path, number, expected,
        )  # fmt: skip


def latest(source: str | int) -> Generator[VideoFrame, None, None]:
    """Decode a camera or stream in a thread, and give the newest frame when one is asked for.

    Frames that came in between are dropped: a consumer that is slower than the camera would
    otherwise see an ever older past.

    Raises:
        DataError: if it cannot be opened, or ends before its first frame.
    """
    reader = _LatestFrame(_open(source))
    start = None
    try:
        while (taken := reader.take()) is not None:
            image, moment = taken
            start = moment if start is None else start
            yield VideoFrame(image, moment - start)
    finally:
        reader.stop()
    if start is None:
        raise DataError(f"{_name(source)} gives no frame. Check it with another program.")
    _LOGGER.warning("%s has ended.", _name(source))


class _LatestFrame:
    """Reads a camera in a thread and keeps its newest frame."""

    def __init__(self, capture: cv2.VideoCapture) -> None:
        self._capture = capture
        self._changed = threading.Condition()
        self._frame: tuple[np.ndarray, float] | None = None
        self._has_ended = False
        self._thread = threading.Thread(target=self._run, name="dsrcnn-camera", daemon=True)
        self._thread.start()

    def take(self) -> tuple[np.ndarray, float] | None:
        """Wait for a frame that was not taken, RGB with its time; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._frame is not None or self._has_ended)
            frame, self._frame = self._frame, None
        if frame is None:
            return None
        image, moment = frame
        return cv2.cvtColor(image, cv2.COLOR_BGR2RGB), moment

    def stop(self) -> None:
        """Close the camera; one that hangs is left to its thread."""
        with self._changed:
            self._has_ended = True
        self._thread.join(_PATIENCE)

    def _run(self) -> None:
        try:
            while not self._has_ended:
                complete, image = self._capture.read()
                with self._changed:
                    if complete:
                        self._frame = image, time.monotonic()
                    else:
                        self._has_ended = True
                    self._changed.notify_all()
        finally:
            self._capture.release()
            with self._changed:
                self._has_ended = True
                self._changed.notify_all()


def _name(source: str | int) -> str:
    return f"Camera {source}" if isinstance(source, int) else f"Stream {source}"


def _open(source: str | int) -> cv2.VideoCapture:
    is_file = isinstance(source, str) and "://" not in source and not is_live(source)
    if is_file and not os.path.isfile(source):
        raise DataError(f"Video {source} does not exist. Correct the path.")
    with _silent_opencv():  # it prints a warning of its own for every absent camera
        capture = cv2.VideoCapture(source)
    if not capture.isOpened():
        capture.release()
        if isinstance(source, int):
            raise DataError(f"Camera {source} cannot be opened. Check its number and permissions.")
        if not is_file:
            raise DataError(f"{_name(source)} cannot be opened. Check the address and the network.")
        raise DataError(f"Video {source} cannot be opened; the file is damaged or no video.")
    return capture


@contextmanager
def _silent_opencv() -> Iterator[None]:
    """Turn off OpenCV's messages, where this version can."""
    # OpenCV 4.13 moved the functions; 0 is silent in both.
    place = getattr(cv2.utils, "logging", cv2)
    if not hasattr(place, "setLogLevel"):
        yield
        return
    level = place.getLogLevel()
    place.setLogLevel(0)
    try:
        yield
    finally:
        place.setLogLevel(level)


def _images(path: str) -> Generator[np.ndarray, None, None]:
    """Decode frames (H, W, 3) RGB."""
    capture = _open(path)
    try:
        while True:
            complete, image = capture.read()
            if not complete:
                return
            yield cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    finally:
        capture.release()
