"""Prediction: images of any kind to results, in batches, tiles or with augmentation."""

import logging
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.structures import Instances
from torch import nn

from ..data.transforms.geometric import Resize
from ..errors import ConfigError, DataError
from ..modeling.meta_arch.base import SparseDetector
from ..modeling.tta import TestTimeAugmentation
from .batching import map_ahead, map_batches
from .results import Result, StageDetections
from .sources import Frame, Reader, is_single, readers
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


class _Prepared(NamedTuple):
    """An image that was read and resized."""

    frame: Frame
    record: dict[str, Any]  # model input


class _Threads(NamedTuple):
    """Threads that run the model, and cores for each."""

    workers: int
    cores: int

    def divide(self) -> None:
        """Limit the thread that calls to its cores."""
        if self.workers > 1:
            torch.set_num_threads(self.cores)


_Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]  # boxes, scores, labels


class Predictor:
    """Predicts with a model.

    Attributes:
        cfg: config of the model.
        model: in evaluation mode.
        classes: class names by label.
        seconds: spent on reading and resizing, in threads, and by the model, so far.
        skipped: errors of the images that the last prediction left out.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module, classes: Sequence[str]) -> None:
        self.cfg, self.model, self.classes = cfg, model.eval(), list(classes)
        self.seconds = {"reading": 0.0, "model": 0.0}
        self.skipped: list[DataError] = []
        self._tta: nn.Module | None = None  # built when it is used first

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
                array, a tensor, the number of a camera, or an iterable of any of them.
            threshold: least score.
            batch: images at once; None for 4, and 1 on a CPU, where images run side by side. Only
                images of equal padded size share a batch, so results do not depend on it.
            size: shorter side of the network input in pixels; None for ``INPUT.MIN_SIZE_TEST``. The
                limit of the longer side grows with it.
            tile: side in pixels of the tiles that an image is predicted in; None for no tiles.
            overlap: of neighboring tiles, as a fraction of their side.
            tta: test-time augmentation (``TEST.AUG``); much slower.
            max_detections: of an image; None for ``TEST.DETECTIONS_PER_IMAGE``.
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
            batch = 1 if self.cfg.MODEL.DEVICE == "cpu" else 4
        settings = Settings(
            *(threshold, batch, size, tile, overlap, tta, max_detections, stages, bgr, stream)
        )
        self._check(settings)
        if stream:
            return self._stream(source, settings)
        if isinstance(source, int) and not isinstance(source, bool):
            raise ConfigError("A camera has no end; write stream=True and stop the loop yourself.")
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
        if isinstance(self.model, SparseDetector):
            return
        name = self.cfg.MODEL.META_ARCHITECTURE
        if settings.stages:
            raise ConfigError(f"stages needs a cascade; {name} has none. Leave it out.")
        if settings.max_detections is not None:
            raise ConfigError(
                f"max_detections is a setting of sparse detectors; with {name} load the model with "
                "opts=['TEST.DETECTIONS_PER_IMAGE', ...]."
            )

    def _stream(self, source: Any, settings: Settings) -> Iterator[Result]:
        """Predict images in order; skip and report those that cannot be read."""
        prepare = self._prepare_whole if settings.tile is None else self._read
        count = 0
        is_camera = isinstance(source, int)
        if is_camera:  # what it shows now, not seconds ago
            settings, ahead = settings._replace(batch=1), 1
        else:
            ahead = 2 * settings.batch + 2 if settings.tile is None else 2  # of whole images
        skipped: list[DataError] = []  # other predictions may run in other threads
        self.skipped = skipped

        def prepared() -> Iterator[tuple[object, _Prepared]]:
            todo = readers(source, bgr=settings.bgr)
            work = partial(prepare, settings=settings)
            for future in map_ahead(work, todo, workers=2, ahead=ahead):
                error = future.exception()
                if isinstance(error, DataError):
                    skipped.append(error)
                    if not is_single(source):
                        _LOGGER.warning("Skipped: %s", error)
                    continue
                item = future.result()
                yield self._padded_size(item), item

        is_one = settings.tile is None and (is_camera or is_single(source))
        with (
            self._threads(one=is_one) as threads,
            closing(
                self._predict_whole(prepared(), settings, threads)
                if settings.tile is None
                else (self._predict_tiles(item, settings, threads) for _, item in prepared())
            ) as results,
        ):
            for result in results:
                count += 1
                yield result
        if skipped and not count:
            raise skipped[0]

    @contextmanager
    def _threads(self, *, one: bool) -> Iterator[_Threads]:
        """Threads of the model; `one` image gets all cores.

        On a CPU images run side by side, which keeps its cores busier than one image on all.
        """
        before = torch.get_num_threads()
        on_cpu = self.cfg.MODEL.DEVICE == "cpu"
        workers = 1 if one or not on_cpu else min(before, _WORKERS)
        try:
            yield _Threads(workers, max(before // workers, 1))
        finally:
            if workers > 1:  # some libraries have one setting for all threads
                torch.set_num_threads(before)

    def _predict_whole(
        self, items: Iterator[tuple[object, _Prepared]], settings: Settings, threads: _Threads
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

    def _read(self, reader: Reader, settings: Settings) -> _Prepared:
        with self._clock("reading"):
            frame = reader()
            assert frame.image is not None
            height, width = frame.image.shape[:2]
            return _Prepared(frame, {"height": height, "width": width})

    def _prepare_whole(self, reader: Reader, settings: Settings) -> _Prepared:
        with self._clock("reading"):
            return self._prepare(reader(), settings)

    @contextmanager
    def _clock(self, name: str, share: int = 1) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += (time.perf_counter() - start) / share

    def _prepare(self, frame: Frame, settings: Settings) -> _Prepared:
        """Resize an image as evaluation does."""
        image = frame.image
        assert image is not None
        if self.cfg.INPUT.FORMAT == "BGR":
            image = image[..., ::-1]
        height, width = image.shape[:2]
        if not settings.tta:
            resize = Resize(self._resizing(settings.size))
            image = resize.get_transform(image).apply_image(image)
        tensor = torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))
        return _lightened(_Prepared(frame, {"image": tensor, "height": height, "width": width}))

    def _resizing(self, size: int | None) -> T.ResizeShortestEdge:
        node = self.cfg.INPUT
        shortest, longest = node.MIN_SIZE_TEST, node.MAX_SIZE_TEST
        if size is not None:
            longest = round(longest * size / shortest) if shortest else longest
            shortest = size
        return T.ResizeShortestEdge(shortest, longest, "choice")

    def _padded_size(self, item: _Prepared) -> object:
        """Size of the network input of an image alone; equal ones share a batch."""
        if "image" not in item.record:
            return None
        height, width = item.record["image"].shape[1:]
        if isinstance(self.model, SparseDetector):
            return self.model.padded_size([(height, width)])
        backbone: Any = self.model.backbone
        step = max(backbone.size_divisibility, 1)
        return -(-height // step) * step, -(-width // step) * step

    def _run(self, items: list[_Prepared], settings: Settings, workers: int) -> list[Result]:
        """Predict a batch, one of `workers` at once."""
        records = [item.record for item in items]
        with self._clock("model", workers), torch.inference_mode():
            if settings.tta:
                outputs = self._augmented(records)
                by_stage: list[list[Instances]] | None = None
            else:
                outputs, by_stage = self._forward(records, settings)
        results = []
        for index, (item, instances) in enumerate(zip(items, outputs, strict=True)):
            stages = None
            if by_stage is not None:
                parts = [_to_arrays(stage[index], settings) for stage in by_stage]
                stages = [StageDetections(*part) for part in parts]
            results.append(self._result(item, _to_arrays(instances, settings), settings, stages))
        return results

    def _forward(
        self, records: list[dict[str, Any]], settings: Settings
    ) -> tuple[list[Instances], list[list[Instances]] | None]:
        """Detections of images, and those of every stage if they are asked for."""
        model = self.model
        if not isinstance(model, SparseDetector):
            return [x["instances"] for x in model(records)], None
        predictions, images = model.raw_predictions(records, all_stages=settings.stages)
        used = self.cfg.MODEL.SparseRCNN.INFERENCE_STAGES
        if used and settings.stages:  # the last of them is the result, as without `stages`
            predictions = predictions.of_sets(slice(used))
        detection = model.detection
        if settings.max_detections is not None:
            detection = replace(detection, limit=settings.max_detections)
        sets = range(len(predictions.stage)) if settings.stages else [len(predictions.stage) - 1]
        by_stage = []
        for index in sets:
            part = predictions.of_sets(slice(index, index + 1))
            outputs = model.postprocess(part, images, records, detection=detection)
            by_stage.append([x["instances"] for x in outputs])
        return by_stage[-1], by_stage if settings.stages else None

    def _augmented(self, records: list[dict[str, Any]]) -> list[Instances]:
        if self._tta is None:
            self._tta = TestTimeAugmentation(self.cfg, self.model)
        return [x["instances"] for x in self._tta(records)]

    def _predict_tiles(self, whole: _Prepared, settings: Settings, threads: _Threads) -> Result:
        """Predict an image in tiles."""
        image = whole.frame.image
        assert image is not None
        assert settings.tile is not None
        height, width = image.shape[:2]
        tiles = make_tiles(height, width, settings.tile, settings.overlap)
        items = (self._prepare(Frame(tile.crop(image)), settings) for tile in tiles)
        keyed = ((self._padded_size(item), item) for item in items)
        parts = list(self._predict_whole(keyed, settings, threads))
        arrays = [(part.boxes, part.scores, part.labels) for part in parts]
        boxes, scores, labels = merge_tiles(tiles, arrays, (height, width))
        most = settings.max_detections or self.cfg.TEST.DETECTIONS_PER_IMAGE
        kept = slice(most if most >= 0 else None)
        whole = _lightened(whole)
        return self._result(whole, (boxes[kept], scores[kept], labels[kept]), settings)

    def _result(
        self,
        item: _Prepared,
        arrays: _Arrays,
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
            stages=stages,
            _image=image,
        )


def _lightened(item: _Prepared) -> _Prepared:
    """Drop the pixels of a large image file, which is read again if it is drawn."""
    frame = item.frame
    is_file = frame.path is not None and frame.number is None
    if is_file and item.record["height"] * item.record["width"] > _KEPT_PIXELS:
        return item._replace(frame=frame._replace(image=None))
    return item


def _to_arrays(instances: Instances, settings: Settings) -> _Arrays:
    """Boxes (K, 4), scores (K,) and labels (K,) from the threshold on, best first."""
    scores = instances.scores.float().cpu()
    order = scores.argsort(descending=True, stable=True)
    order = order[scores[order] >= settings.threshold][: settings.max_detections]
    parts = (instances.pred_boxes.tensor.float(), instances.scores.float(), instances.pred_classes)
    boxes, scores, labels = (part.cpu()[order].numpy() for part in parts)
    return boxes, scores, labels
