"""``dsrcnn predict``: detections of images, folders, videos and cameras."""

import argparse
import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType

import cv2
import numpy as np
from tqdm import tqdm

from ..engine.interrupt import handled_by
from ..errors import ConfigError, DataError
from ..inference.batching import Background
from ..inference.exported import load_exported
from ..inference.predictor import Predictor
from ..inference.results import Result
from ..inference.saving import (
    KINDS,
    Writer,
    build_writers,
    check_kinds,
)
from ..inference.sources import source_files
from ..inference.targets import check_targets, prepare_output, without_earlier
from ..inference.videos import is_live, is_video, video_info
from .options import (
    add_detector_arguments,
    fraction,
    load_detector,
    positive_int,
    require_detector,
)

_LOGGER = logging.getLogger(__name__)
_USAGE = "%(prog)s SOURCE ... --model MODEL [options] [KEY VALUE ...]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.usage = _USAGE
    text = "image, folder, pattern such as 'photos/*.jpg', video, camera by number, or rtsp://..."
    parser.add_argument("sources", nargs="*", metavar="SOURCE", help=text)
    add_detector_arguments(parser, more=", or an exported ONNX file")
    text = "folder to write to (default: RUN/detections, or detections)"
    parser.add_argument("--output", type=Path, metavar="FOLDER", help=text)
    text = f"what to write, of {','.join(KINDS)} (default: pictures,video,csv)"
    parser.add_argument("--save", default="pictures,video,csv", metavar="KINDS", help=text)
    text = "COCO json whose ids the results of --save coco get"
    parser.add_argument("--annotations", type=Path, metavar="FILE", help=text)
    text = "least score (default: 0.3; with --annotations 0, as metrics need all detections)"
    parser.add_argument("--threshold", type=fraction, metavar="X", help=text)
    text = "images at once (default: 4; on a CPU 1, where images run side by side)"
    parser.add_argument("--batch", type=positive_int, metavar="N", help=text)
    text = "shorter side of the network input (default: INPUT.MIN_SIZE_TEST)"
    parser.add_argument("--size", type=positive_int, metavar="N", help=text)
    text = "predict large images in tiles of this side"
    parser.add_argument("--tile", type=positive_int, metavar="N", help=text)
    text = "overlap of tiles, as a fraction of their side (default: 0.2)"
    parser.add_argument("--overlap", type=fraction, default=0.2, metavar="X", help=text)
    text = "detections per image (default: TEST.DETECTIONS_PER_IMAGE; of each tile with --tile)"
    parser.add_argument("--max-detections", type=positive_int, metavar="N", help=text)
    parser.add_argument("--tta", action="store_true", help="test-time augmentation; slower")
    parser.add_argument("--show", action="store_true", help="show pictures in a window; q ends")
    parser.add_argument("--device", metavar="NAME", help="such as cpu or cuda:1")


def run(args: argparse.Namespace) -> int:
    """Predict all sources, write what is asked for, and print a summary.

    Returns:
        0; 1 if an image could not be read or its results not written.
    """
    words = [*args.sources, *args.unknown]
    opts = args.opts[: len(args.opts) - len(args.unknown)]
    if not words:
        raise ConfigError("write SOURCE: an image, a folder, a video or the number of a camera.")
    require_detector(args)
    kinds = [kind for kind in args.save.split(",") if kind]
    output = args.output or Path(args.model if os.path.isdir(args.model) else ".") / "detections"
    check_kinds(kinds, args.annotations)
    sources = without_earlier([_source(word) for word in words])
    check_targets(sources, kinds, output)
    if kinds:
        prepare_output(output, kinds)
    detector = _load(args, opts)
    writers = build_writers(kinds, output, detector.classes, args.annotations)
    if args.threshold is None:
        args.threshold = 0.0 if args.annotations else 0.3
    with handled_by(_end, (signal.SIGTERM, signal.SIGHUP)):
        return _Job(detector, args, sources, writers).run()


def _source(word: str) -> str | int:
    """Return the number of a camera, or a path."""
    return int(word) if word.isdecimal() and not os.path.lexists(word) else word


def _load(args: argparse.Namespace, opts: list[str]) -> Predictor:
    if args.model.endswith(".onnx"):
        rest = {"--config": args.config, "--device": args.device, "KEY VALUE": opts}
        for name, value in rest.items():
            if value:
                raise ConfigError(f"{name} does not go with an exported model; leave it out.")
        return load_exported(args.model)
    return load_detector(args, opts)


def _end(number: int, frame: FrameType | None) -> None:
    """End the program by an exception, so that files are completed."""
    raise SystemExit(128 + number)


class _Job:
    """A run over all sources, with its counts and times."""

    def __init__(
        self,
        detector: Predictor,
        args: argparse.Namespace,
        sources: list[str | int],
        writers: list[Writer],
    ) -> None:
        self.detector, self.args, self.writers = detector, args, writers
        self.sources = sources
        self.images = self.detections = self.unwritten = 0
        self.drawing_seconds = 0.0

    def run(self) -> int:
        """Predict; whatever ends it, what was done is written."""
        start = time.perf_counter()
        written: list[Path] = []
        saving = Background(self._save, ahead=8)
        try:
            with tqdm(total=self._expected(), unit="image", disable=None) as bar:
                for result in self._results():
                    self.images += 1
                    self.detections += len(result)
                    saving.put(result)
                    bar.update()
                    if self.args.show and not _show(result):
                        break
        finally:
            try:
                saving.close()
            finally:
                written = self._close_writers()
        self._summarize(time.perf_counter() - start, written)
        return 1 if self.detector.skipped or self.unwritten else 0

    def _close_writers(self) -> list[Path]:
        """Close all writers, whatever one of them raises; returns their files."""
        written, failure = list[Path](), None
        for writer in self.writers:
            try:
                written += writer.close()
            except Exception as error:
                failure = failure or error
        if failure is not None:
            raise failure
        return written

    def _results(self) -> Iterator[Result]:
        args = self.args
        source = self.sources[0] if len(self.sources) == 1 else self.sources
        results: Iterator[Result] = self.detector.predict(
            source,
            threshold=args.threshold,
            batch=args.batch,
            size=args.size,
            tile=args.tile,
            overlap=args.overlap,
            tta=args.tta,
            max_detections=args.max_detections,
            stream=True,
        )
        return results

    def _expected(self) -> int | None:
        """Number of images, as far as it is known without reading them; None for cameras."""
        total = 0
        for source in self.sources:
            if isinstance(source, int) or is_live(source):
                return None
            if is_video(source):
                with suppress(DataError):  # reported when it is read
                    total += video_info(source).frames
            else:
                total += len(source_files(source))
        return total

    def _save(self, result: Result) -> None:
        start = time.perf_counter()
        for writer in self.writers:
            try:
                writer.write(result)
            except DataError as error:  # of this image; the others are written
                self.unwritten += 1
                _LOGGER.warning("Not written: %s", error)
        self.drawing_seconds += time.perf_counter() - start

    def _summarize(self, seconds: float, written: list[Path]) -> None:
        skipped = len(self.detector.skipped)
        text = f"{self.images} images, {self.detections} detections"
        if skipped:
            text += f", {skipped} skipped"
        if self.unwritten:
            text += f", {self.unwritten} not written"
        if self.images:
            each = {**self.detector.seconds, "writing": self.drawing_seconds}
            parts = ", ".join(f"{k} {1000 * v / self.images:.0f}" for k, v in each.items())
            text += f" in {seconds:.1f} s: {self.images / seconds:.1f} images/s (ms: {parts})"
        print(text)
        for path in written:
            print(path)


def _show(result: Result) -> bool:
    """Show a picture; returns False after the key q or Escape.

    Raises:
        ConfigError: if OpenCV has no windows.
    """
    try:
        cv2.imshow("dsrcnn", np.ascontiguousarray(np.asarray(result.plot())[..., ::-1]))
        wait = 1 if result.frame is not None else 0
        return cv2.waitKey(wait) & 0xFF not in (ord("q"), 27)
    except cv2.error as error:
        raise ConfigError(
            "--show needs windows, which this OpenCV or machine does not have. Leave it out, or "
            "pip uninstall opencv-python-headless and pip install opencv-python."
        ) from error
