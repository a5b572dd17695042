"""Prediction: images of any kind to results, in batches or tiles, whatever runs the model."""

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np
import torch

from ..data.images import allow_large_images
from ..errors import ConfigError, DataError
from .batching import map_ahead, map_batches
from .results import Result, StageDetections
from .sources import Frame, Reader, has_live, is_single, readers
from .tiling import make_tiles, merge_tiles

_LOGGER = logging.getLogger(__name__)


class Settings(NamedTuple):
    """Settings of a prediction, see `Predictor.predict`."""

    threshold: float
    batch: int
    size: int | None
    tile: int | None
    overlap: float
    tta: bool
    max_detections: int | None
    stages: bool
    bgr: bool
    stream: bool


# By setting: type, least and largest value, whether it may be None.
_LIMITS: dict[str, tuple[type, float, float, bool]] = {
    "threshold": (Real, 0, 1, False), "batch": (Integral, 1, 10_000, False),
    "size": (Integral, 1, 100_000, True), "tile": (Integral, 16, 1_000_000, True),
    "overlap": (Real, 0, 0.9, False), "max_detections": (Integral, 1, 1_000_000, True),
}  # fmt: skip
_CONFLICTS = [("tta", name) for name in ("stages", "tile", "size", "max_detections")]
_CONFLICTS += [("tile", "stages")]


_WORKERS = 4  # at most, on a CPU; each needs memory for the activations of a batch
_KEPT_PIXELS = 4_000_000  # of images that wait for the model or for being drawn


class Prepared(NamedTuple):
    """An image that was read and resized."""

    frame: Frame
    record: dict[str, Any]  # model input


class Threads(NamedTuple):
    """Threads that run the model, and cores for each."""

    workers: int  # 0 for the thread that calls
    cores: int

    def divide(self) -> None:
        """Limit the thread that calls to its cores."""
        if self.workers > 1:
            torch.set_num_threads(self.cores)


Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]  # boxes (K, 4), scores, labels


class Predictor(ABC):
    """Predicts images of any source; subclasses run the model.

    Attributes:
        classes: class names by label.
        on_cpu: whether the model runs on the CPU.
        seconds: spent on reading and resizing, in threads, and by the model, so far.
        skipped: errors of the images that the last prediction left out.
    """

    def __init__(self, classes: Sequence[str], *, on_cpu: bool) -> None:
        self.classes, self.on_cpu = list(classes), on_cpu
        self.seconds = {"reading": 0.0, "model": 0.0}
        self.skipped: list[DataError] = []

    @abstractmethod
    def _check_settings(self, settings: Settings) -> None:
        """Raise a `ConfigError` for settings that the model does not have."""

    @abstractmethod
    def _prepare(self, frame: Frame, settings: Settings) -> Prepared:
        """Make the model input of an image."""

    @abstractmethod
    def _batch_key(self, item: Prepared) -> object:
        """Return what images that share a batch have in common."""

    @abstractmethod
    def _detect(
        self, records: list[dict[str, Any]], settings: Settings
    ) -> list[tuple[Arrays, list[Arrays] | None]]:
        """Run the model; returns the detections of each image, and those of its stages."""

    def _default_batch(self) -> int:
        return 1 if self.on_cpu else 4

    def predict(
        self,
        source: Any,
        *,
        threshold: float = 0.3,
        batch: int | None = None,
        size: int | None = None,
        tile: int | None = None,
        overlap: float = 0.2,
        tta: bool = False,
        max_detections: int | None = None,
        stages: bool = False,
        bgr: bool = False,
        stream: bool = False,
    ) -> Any:
        """Detect objects.

        Images that cannot be read are reported and left out; a single one is an error.

        Args:
            source: see `readers`: a path of an image or video, a pattern, a folder, a PIL image, an
                array, a tensor, the number of a camera, the address of a stream, or an iterable of
                any of them.
            threshold: least score.
            batch: images at once; None for 4, and 1 on a CPU, where images run side by side. Only
                images of equal padded size share a batch, so results do not depend on it.
            size: shorter side of the network input in pixels; None for ``INPUT.MIN_SIZE_TEST``. The
                limit of the longer side grows with it.
            tile: side in pixels of the tiles that an image is predicted in; None for no tiles. With
                tiles, images of up to 2**30 pixels are read, from then on in the whole process.
            overlap: of neighboring tiles, as a fraction of their side.
            tta: test-time augmentation (``TEST.AUG``); much slower.
            max_detections: of an image; None for ``TEST.DETECTIONS_PER_IMAGE``, or with tiles for
                that many in each tile.
            stages: also return the detections of every stage of a cascade.
            bgr: channel order of arrays.
            stream: return an iterator, for videos, cameras and more images than fit into memory.

        Returns:
            The result of a single image; otherwise a list in the order of the source, or an
            iterator with `stream`.

        Raises:
            ConfigError: for a setting out of range.
            DataError: if a single source, or all of several, cannot be read.
        """
        if batch is None:
            batch = self._default_batch()
        settings = Settings(
            *(threshold, batch, size, tile, overlap, tta, max_detections, stages, bgr, stream)
        )
        self._check(settings)
        if tile is not None:
            allow_large_images()
        if stream:
            return self._stream(source, settings)
        if has_live(source):
            raise ConfigError(
                "A camera or stream has no end; write stream=True and stop the loop yourself."
            )
        results = list(self._stream(source, settings))
        return results[0] if is_single(source) else results

    def _check(self, settings: Settings) -> None:
        """Raise a `ConfigError` for settings out of range."""
        for name, (kind, low, high, optional) in _LIMITS.items():
            value = getattr(settings, name)
            is_number = isinstance(value, kind) and not isinstance(value, bool)
            if not (is_number and low <= value <= high) and not (optional and value is None):
                whole = "a whole number" if kind is Integral else "a number"
                raise ConfigError(f"{name} is {value!r}; write {whole} from {low} to {high}.")
        for first, second in _CONFLICTS:
            if all(getattr(settings, name) not in (None, False) for name in (first, second)):
                raise ConfigError(f"{first} cannot be combined with {second}; leave one out.")
        self._check_settings(settings)

    def _stream(self, source: Any, settings: Settings) -> Iterator[Result]:
        """Predict images in order; skip and report those that cannot be read."""
        prepare = self._prepare_whole if settings.tile is None else self._read
        count = 0
        is_camera = has_live(source)
        if is_camera:  # what it shows now, not seconds ago
            settings, ahead = settings._replace(batch=1), 1
        else:
            ahead = 2 * settings.batch + 2 if settings.tile is None else 2  # of whole images
        skipped: list[DataError] = []  # other predictions may run in other threads
        self.skipped = skipped

        def prepared() -> Generator[tuple[object, Prepared], None, None]:
            work = partial(prepare, settings=settings)
            with (
                closing(readers(source, bgr=settings.bgr)) as todo,
                closing(map_ahead(work, todo, workers=2, ahead=ahead)) as futures,
            ):
                for future in futures:
                    error = future.exception()
                    if isinstance(error, DataError):
                        skipped.append(error)
                        if not is_single(source):
                            _LOGGER.warning("Skipped: %s", error)
                        continue
                    item = future.result()
                    yield None if settings.tile else self._batch_key(item), item

        is_one = settings.tile is None and (is_camera or is_single(source))
        with (
            self._threads(one=is_one) as threads,
            closing(prepared()) as items,  # an error would keep a camera open
            closing(
                self._predict_whole(items, settings, threads)
                if settings.tile is None
                else (self._predict_tiles(item, settings, threads) for _, item in items)
            ) as results,
        ):
            for result in results:
                count += 1
                yield result
        if skipped and not count:
            raise skipped[0]

    @contextmanager
    def _threads(self, *, one: bool) -> Iterator[Threads]:
        """Threads of the model; `one` image at a time gets all cores, and no thread of its own.

        On a CPU images run side by side, which keeps its cores busier than one image on all. One
        image runs in the thread that calls: OpenMP lets the cores of a second one sleep after each
        operator, as if there were too many.
        """
        before = torch.get_num_threads()
        workers = 0 if one else min(before, _WORKERS) if self.on_cpu else 1
        try:
            yield Threads(workers, max(before // max(workers, 1), 1))
        finally:
            if workers > 1:  # some libraries have one setting for all threads
                torch.set_num_threads(before)

    def _predict_whole(
        self, items: Iterator[tuple[object, Prepared]], settings: Settings, threads: Threads
    ) -> Generator[Result, None, None]:
        """Predict images in batches."""
        size = 1 if settings.tta else settings.batch
        run = partial(self._run, settings=settings, workers=threads.workers)
        yield from map_batches(
            run,
            items,
            size=size,
            window=4 * size,
            workers=threads.workers,
            initializer=threads.divide,
        )

    def _read(self, reader: Reader, settings: Settings) -> Prepared:
        with self._clock("reading"):
            frame = reader()
            assert frame.image is not None
            height, width = frame.image.shape[:2]
            return Prepared(frame, {"height": height, "width": width})

    def _prepare_whole(self, reader: Reader, settings: Settings) -> Prepared:
        with self._clock("reading"):
            return self._prepare(reader(), settings)

    @contextmanager
    def _clock(self, name: str, share: int = 1) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += (time.perf_counter() - start) / share

    def _run(self, items: list[Prepared], settings: Settings, workers: int) -> list[Result]:
        """Predict a batch, one of `workers` at once."""
        with self._clock("model", max(workers, 1)):
            outputs = self._detect([item.record for item in items], settings)
        results = []
        for item, (arrays, by_stage) in zip(items, outputs, strict=True):
            stages = None
            if by_stage is not None:
                stages = [StageDetections(*_limited(part, settings)) for part in by_stage]
            results.append(self._result(item, _limited(arrays, settings), settings, stages))
        return results

    def _predict_tiles(self, whole: Prepared, settings: Settings, threads: Threads) -> Result:
        """Predict an image in tiles."""
        image = whole.frame.image
        assert image is not None
        assert settings.tile is not None
        height, width = image.shape[:2]
        tiles = make_tiles(height, width, settings.tile, settings.overlap)
        items = (self._prepare(Frame(tile.crop(image)), settings) for tile in tiles)
        keyed = ((self._batch_key(item), item) for item in items)
        parts = list(self._predict_whole(keyed, settings, threads))
        arrays = [(part.boxes, part.scores, part.labels) for part in parts]
        boxes, scores, labels = merge_tiles(tiles, arrays, (height, width))
        kept = slice(settings.max_detections)  # None: each tile has the limit of the model
        whole = lightened(whole)
        return self._result(whole, (boxes[kept], scores[kept], labels[kept]), settings)

    def _result(
        self,
        item: Prepared,
        arrays: Arrays,
        settings: Settings,
        stages: list[StageDetections] | None = None,
    ) -> Result:
        frame = item.frame
        # Files are read again if they are drawn; frames of videos are kept one at a time only.
        is_kept = frame.path is None or settings.stream
        image = frame.image if is_kept and (frame.number is None or settings.stream) else None
        return Result(
            *arrays,
            classes=self.classes,
            size=(item.record["height"], item.record["width"]),
            path=frame.path,
            frame=frame.number,
            seconds=frame.seconds,
            stages=stages,
            _image=image,
        )


def lightened(item: Prepared) -> Prepared:
    """Drop the pixels of a large image file, which is read again if it is drawn."""
    frame = item.frame
    is_file = frame.path is not None and frame.number is None
    if is_file and item.record["height"] * item.record["width"] > _KEPT_PIXELS:
        return item._replace(frame=frame._replace(image=None))
    return item


def _limited(arrays: Arrays, settings: Settings) -> Arrays:
    """Keep the detections from the threshold on, best first, up to the limit."""
    boxes, scores, labels = arrays
    order = np.argsort(-scores, kind="stable")
    order = order[scores[order] >= settings.threshold][: settings.max_detections]
    return boxes[order], scores[order], labels[order]
