"""Metadata of an exported model."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import ExportError

KEY = "dsrcnn"  # of the metadata in an exported file
INPUT = "images"
OUTPUTS = ("boxes", "scores", "labels")


@dataclass(frozen=True)
class ModelInfo:
    """Metadata of an exported model, which travels in its file.

    Attributes:
        architecture: ``MODEL.META_ARCHITECTURE``.
        classes: names by label.
        height: in pixels; images are resized to fit, with their aspect ratio.
        width: in pixels.
        padded_height: of the network input.
        padded_width: of the network input.
        dynamic_batch: whether any number of images is accepted; otherwise one.
        nms: IoU of NMS; None without NMS.
        half: float16 instead of float32 inside.
        detections: most detections of an image.
        version: of this package.
        input: the input in words.
    """

    architecture: str
    classes: list[str]
    height: int
    width: int
    padded_height: int
    padded_width: int
    dynamic_batch: bool
    nms: float | None
    half: bool
    detections: int
    version: str
    input: str = "uint8 RGB (images, height, width, 3), of any height and width"

    def to_json(self) -> str:
        """Return the metadata as text."""
        return json.dumps(asdict(self), ensure_ascii=True)

    @classmethod
    def from_json(cls, text: str | None, path: str) -> "ModelInfo":
        """Read the text of `to_json`.

        Raises:
            ExportError: if the file `path` has none, or one of another version.
        """
        try:
            content: Any = json.loads(text or "")
            info = cls(**content)
            info._check()
            return info
        except (TypeError, ValueError) as error:
            raise ExportError(
                f"{path} was not exported by this version of dsrcnn: its metadata {KEY!r} are "
                f"missing or others ({error}). Export the model again: dsrcnn export."
            ) from error

    def _check(self) -> None:
        names = isinstance(self.classes, list) and all(isinstance(c, str) for c in self.classes)
        sides = (self.height, self.width, self.padded_height, self.padded_width)
        numbers = all(type(n) is int and n > 0 for n in sides) and type(self.detections) is int
        flags = type(self.dynamic_batch) is bool and type(self.half) is bool
        if not (names and numbers and flags and isinstance(self.architecture, str)):
            raise ValueError("a value of another type")
