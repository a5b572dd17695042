"""Prediction with an exported model, without its code."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, ExportError
from ..export.formats import OnnxSession
from .predictor import Arrays, Predictor, Prepared, Settings, lightened
from .sources import Frame


def load_exported(path: str | os.PathLike[str]) -> "ExportedDetector":
    """Load an ONNX file that `Detector.export` or ``dsrcnn export`` has written.

    Raises:
        ExportError: if it is another file, or damaged.
        MissingPackageError: if onnxruntime is not installed.
    """
    if Path(path).suffix != ".onnx":
        raise ExportError(
            f"{path} is no ONNX file. Files of torch.export and TorchScript are for other "
            "programs; load them with torch.export.load or torch.jit.load if you trust them."
        )
    return ExportedDetector(Path(path))


class ExportedDetector(Predictor):
    """An exported detector; `predict` is that of `Detector`.

    Attributes:
        path: of the file.
        info: its metadata.
    """

    def __init__(self, path: Path) -> None:
        """Open a file; see `load_exported`."""
        self.path, self._session = path, OnnxSession(path)
        self.info = self._session.info
        super().__init__(self.info.classes, on_cpu=not self._session.on_gpu)

    def __repr__(self) -> str:
        """Name the architecture, the file and the classes."""
        name, count = self.info.architecture, len(self.classes)
        return f"ExportedDetector({name}, {count} classes, path={str(self.path)!r})"

    def _check_settings(self, settings: Settings) -> None:
        for name in ("tta", "stages", "size"):
            if getattr(settings, name):
                raise ConfigError(
                    f"{name} is not possible with an exported model; leave it out, or load the "
                    "trained model."
                )
        limit, most = self.info.detections, settings.max_detections
        if settings.tile is None and most is not None and 0 <= limit < most:
            raise ConfigError(
                f"max_detections is {most}, but {self.path} returns at most {limit}; export it "
                "with a larger TEST.DETECTIONS_PER_IMAGE."
            )
        if settings.batch > 1 and not self.info.dynamic_batch:
            raise ConfigError(
                f"batch is {settings.batch}, but {self.path} takes one image at a time; leave it "
                "out, or export with --dynamic-batch."
            )

    def _default_batch(self) -> int:
        return super()._default_batch() if self.info.dynamic_batch else 1

    def _prepare(self, frame: Frame, settings: Settings) -> Prepared:
        image = frame.image
        assert image is not None
        height, width = image.shape[:2]
        record = {"image": image, "height": height, "width": width}
        return lightened(Prepared(frame, record))

    def _batch_key(self, item: Prepared) -> object:
        return item.record["image"].shape

    def _detect(
        self, records: list[dict[str, Any]], settings: Settings
    ) -> list[tuple[Arrays, list[Arrays] | None]]:
        images = np.stack([record["image"] for record in records])
        return [(arrays, None) for arrays in self._session.run(images)]
