"""The views of the page: detections by stage, assignments, videos. None of them knows the page."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
from detectron2.config import CfgNode

from ..analysis.assignment import Assignments, compare_assignments
from ..analysis.images import require_architecture, shrunk, training_images
from ..data.images import read_image
from ..errors import DataError
from ..inference import Detector, Result
from ..inference.saving import open_video, write_frame
from ..inference.videos import is_live, is_video, video_info
from ..modeling import SparseRCNN
from ..modeling.meta_arch.base import SparseDetector

COLUMNS = ("class", "score", "x1", "y1", "x2", "y2")
_SIDE = 480  # least, of pictures of assignments, in pixels
_MOST = 16_000  # pixels of a side; JPEG files have up to 65,535, canvases of browsers 16,384
_PERIOD = 0.5  # seconds between two reports of progress


class Shown(NamedTuple):
    """Detections as they are shown.

    Attributes:
        picture: (H, W, 3) uint8 RGB.
        rows: a row of `COLUMNS` for each detection.
        summary: one line.
    """

    picture: np.ndarray
    rows: list[list[str | float]]
    summary: str


def count_stages(detector: Detector) -> int:
    """Number of stages that detections can be shown of; 1 for models without a cascade."""
    if not isinstance(detector.model, SparseDetector):
        return 1
    blank = np.zeros((64, 64, 3), np.uint8)
    return len(detector.predict(blank, stages=True).stages)


def detect(detector: Detector, path: str) -> Result:
    """Detect objects in an image file, at all stages and with any score.

    Raises:
        DataError: if it cannot be read.
    """
    pixels = read_image({"file_name": path}, "RGB")  # a file only: no folder, pattern or video
    is_cascade = isinstance(detector.model, SparseDetector)
    result: Result = detector.predict(pixels, threshold=0, stages=is_cascade)
    return result


def show(result: Result, threshold: float, stage: int) -> Shown:
    """Draw the detections of a stage, from 1, with a score of at least `threshold`."""
    part = result.above(threshold)
    if result.stages is not None:
        part = part.at_stage(int(stage) - 1)
    rows: list[list[str | float]] = [
        [entry["name"], round(entry["score"], 3), *(round(entry[k], 1) for k in COLUMNS[2:])]
        for entry in part.to_dict()
    ]
    counts = [f"{part.names.count(name)} {name}" for name in dict.fromkeys(part.names)]
    height, width = part.size
    summary = f"{len(part)} detections in {width} x {height} pixels"
    if counts:
        summary += f": {', '.join(counts)}"
    picture, _ = shrunk(np.asarray(part.plot()), _MOST)
    return Shown(picture, rows, summary)


class AssignmentView:
    """Assignments of labeled images by one-to-one matching and by DLA, at every stage.

    Attributes:
        names: of the images.
    """

    def __init__(self, detector: Detector, cfg: CfgNode, *, images: int = 24) -> None:
        """Choose images of the training set of `cfg`, evenly spaced.

        Raises:
            ConfigError: if the model is no Sparse R-CNN.
            DataError: if there is no training set, or it has no annotation.
        """
        require_architecture(cfg, SparseRCNN, "The assignment view")
        self._detector, self._cfg = detector, cfg
        self._inputs = training_images(cfg, images)
        names = (Path(record["file_name"]).name for record in self._inputs)
        self.names = [f"{number}. {name}" for number, name in enumerate(names, start=1)]

    @property
    def paths(self) -> list[str]:
        """Image files."""
        return [record["file_name"] for record in self._inputs]

    def assign(self, name: str) -> Assignments:
        """Assign the predictions for an image."""
        inputs = [self._inputs[self.names.index(name)]]
        model = cast(SparseRCNN, self._detector.model)
        return next(compare_assignments(model, self._cfg, inputs))


def show_assignment(assignments: Assignments, matcher: str, stage: int) -> tuple[np.ndarray, str]:
    """Draw the assignment at a stage, from 1; returns RGB and one line."""
    index = assignments.stages.index(int(stage) - 1)  # of the route without recollection
    number, objects = assignments.positives(matcher, index), len(assignments.objects)
    text = f"{number} proposals for {objects} objects at stage {stage}"
    if objects:
        text += f" ({number / objects:.1f} each)"
    return np.ascontiguousarray(assignments.draw(matcher, index, min_side=_SIDE)[..., ::-1]), text


def detect_video(
    detector: Detector, path: str, threshold: float, output: Path
) -> Iterator[tuple[Path | None, str]]:
    """Draw detections on every frame of a video.

    Args:
        detector: the detector.
        path: video file.
        threshold: least score.
        output: file to write; the ending chooses the format.

    Yields:
        None and the progress; last the file and a summary.

    Raises:
        DataError: if the video cannot be read or written.
    """
    if not is_video(path) or is_live(path):
        raise DataError(f"{Path(path).name} is no video that can be read; upload an MP4 or WebM.")
    info = video_info(path)
    writer = open_video(output, info.fps, (info.width, info.height))
    start = shown = time.perf_counter()
    count = 0
    try:
        for count, result in enumerate(
            detector.predict(path, threshold=threshold, stream=True), start=1
        ):
            write_frame(writer, result)
            if time.perf_counter() - shown > _PERIOD:
                shown = time.perf_counter()
                total = f" of {info.frames}" if info.frames else ""
                speed = count / (shown - start)
                yield None, f"{count}{total} frames, {speed:.1f} frames/s"
    finally:
        writer.release()
    yield output, f"{count} frames, {count / (time.perf_counter() - start):.1f} frames/s"
