"""Detections of an image, and their conversion to other libraries."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image

from ..data.images import read_image
from ..errors import DataError, MissingPackageError
from ..visualization.fonts import common_labels

if TYPE_CHECKING:
    import supervision


@dataclass(frozen=True, eq=False)  # arrays have no truth value
class StageDetections:
    """Detections of one stage of a cascade: boxes (K, 4), scores and labels (K,)."""

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True, eq=False)  # arrays have no truth value
class Result:
    """Detections of an image, best first.

    Attributes:
        boxes: (K, 4) float32 xyxy in pixels of the image.
        scores: (K,) float32, 0 to 1.
        labels: (K,) int64, indices of `classes`.
        classes: names of all classes of the model.
        size: height and width of the image in pixels.
        path: file of the image or video; None for an image in memory or a camera.
        frame: number of the frame in a video or camera, from 0; None for other images.
        seconds: since the first frame of a camera or stream; None for others.
        stages: detections of every stage of a cascade, if they were asked for.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    classes: Sequence[str]
    size: tuple[int, int]
    path: str | None = None
    frame: int | None = None
    seconds: float | None = None
    stages: list[StageDetections] | None = None
    _image: np.ndarray | None = field(default=None, repr=False)

    def __len__(self) -> int:
        """Return the number of detections."""
        return len(self.scores)

    @property
    def names(self) -> list[str]:
        """Class name of every detection."""
        return [self.classes[label] for label in self.labels]

    @property
    def image(self) -> np.ndarray:
        """The image (H, W, 3) uint8 RGB; that of a file is read again.

        Raises:
            DataError: if the file is gone, or the frame was not kept.
        """
        if self._image is not None:
            return self._image
        if self.path is None or self.frame is not None:
            raise DataError(
                "The frames of a video are kept with stream=True only, one at a time. Draw in "
                "the loop over predict(..., stream=True)."
            )
        return read_image({"file_name": self.path}, "RGB")

    def above(self, threshold: float) -> "Result":
        """Return the detections with a score of at least `threshold`, at all stages."""
        stages = None
        if self.stages is not None:
            stages = [StageDetections(*_above(stage, threshold)) for stage in self.stages]
        boxes, scores, labels = _above(self, threshold)
        return replace(self, boxes=boxes, scores=scores, labels=labels, stages=stages)

    def at_stage(self, stage: int) -> "Result":
        """Return the detections of a stage of the cascade, from 0, instead of the last.

        Raises:
            DataError: if the stages were not asked for, or there is no such stage.
        """
        if self.stages is None:
            raise DataError("The result has no stages; write predict(..., stages=True).")
        if not 0 <= stage < len(self.stages):
            raise DataError(
                f"The result has no stage {stage}; write one from 0 to {len(self.stages) - 1}."
            )
        part = self.stages[stage]
        return replace(self, boxes=part.boxes, scores=part.scores, labels=part.labels)

    def plot(self) -> Image.Image:
        """Draw boxes with class names and scores on the image.

        Raises:
            MissingPackageError: if supervision is not installed.
        """
        return Image.fromarray(draw_detections(self.image, self.to_supervision(), self.classes))

    def save(self, path: str | Path) -> Path:
        """Write `plot` to a file and return its path; the ending is the format.

        Raises:
            DataError: if it cannot be written.
        """
        path = Path(path)
        picture = self.plot()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
        except (OSError, ValueError) as error:  # Pillow raises ValueError for unknown endings
            raise DataError(f"Picture {path} cannot be written: {error}.") from error
        return path

    def to_coco(
        self, image_id: int | str = 0, category_ids: Sequence[int | str] | None = None
    ) -> list[dict[str, Any]]:
        """Convert to entries of COCO results: ``bbox`` (XYWH), ``score``, ``category_id``.

        Args:
            image_id: of the image in the annotations.
            category_ids: by label; None for label + 1.
        """
        return [
            {
                "image_id": image_id,
                "category_id": category_ids[label] if category_ids else int(label) + 1,
                "bbox": [round(float(v), 3) for v in (x1, y1, x2 - x1, y2 - y1)],
                "score": float(score),  # rounded ones would tie, which changes AP
            }
            for (x1, y1, x2, y2), score, label in zip(
                self.boxes, self.scores, self.labels, strict=True
            )
        ]

    def to_supervision(self) -> "supervision.Detections":
        """Convert to supervision's `Detections`, with ``class_name`` in its data.

        Raises:
            MissingPackageError: if supervision is not installed.
        """
        sv = import_supervision()
        return sv.Detections(
            xyxy=self.boxes.reshape(-1, 4),
            confidence=self.scores,
            class_id=self.labels,
            data={"class_name": np.array(self.names, dtype=str)},
        )

    def to_instances(self) -> Instances:
        """Convert to Detectron2's `Instances`."""
        instances = Instances(self.size)
        instances.pred_boxes = Boxes(torch.from_numpy(self.boxes.copy()))
        instances.scores = torch.from_numpy(self.scores.copy())
        instances.pred_classes = torch.from_numpy(self.labels.copy())
        return instances

    def to_dict(self) -> list[dict[str, Any]]:
        """Convert to a dictionary for each detection, with plain numbers and texts."""
        rows = zip(self.names, self.labels, self.scores, self.boxes, strict=True)
        return [
            {
                "path": self.path,
                "frame": self.frame,
                "name": name,
                "label": int(label),
                "score": float(score),
                **dict(zip(("x1", "y1", "x2", "y2"), map(float, box), strict=True)),
            }
            for name, label, score, box in rows
        ]

    def to_pandas(self) -> Any:
        """Convert to a pandas ``DataFrame``: a row per detection, the columns of `to_dict`.

        Raises:
            MissingPackageError: if pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise MissingPackageError(
                "Data frames need the package pandas: pip install pandas"
            ) from error
        columns = ["path", "frame", "name", "label", "score", "x1", "y1", "x2", "y2"]
        return pd.DataFrame(self.to_dict(), columns=columns)


def _above(
    part: Result | StageDetections, threshold: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    kept = part.scores >= threshold
    return part.boxes[kept], part.scores[kept], part.labels[kept]


def import_supervision() -> Any:
    """Import supervision.

    Raises:
        MissingPackageError: if it is not installed.
    """
    try:
        import supervision
    except ImportError as error:
        raise MissingPackageError(
            "Pictures of predictions need the package supervision: pip install 'dsrcnn[predict]'"
        ) from error
    return supervision


def draw_detections(
    image: np.ndarray, detections: "supervision.Detections", classes: Sequence[str]
) -> np.ndarray:
    """Draw boxes with names and scores on a copy of an RGB image; texts avoid each other."""
    sv = import_supervision()
    height, width = image.shape[:2]
    thickness = sv.calculate_optimal_line_thickness((width, height))
    scale = sv.calculate_optimal_text_scale((width, height))
    names, font = common_labels(tuple(classes))
    pairs = zip(np.asarray(detections.class_id), np.asarray(detections.confidence), strict=True)
    labels = [f"{names[index]} {score:.2f}" for index, score in pairs]
    boxes = sv.BoxAnnotator(thickness=thickness)
    options: dict[str, Any] = {"text_padding": max(2, round(8 * scale)), "smart_position": True}
    if font is None:
        texts = sv.LabelAnnotator(text_scale=scale, **options)
    else:
        size = max(1, round(30 * scale))  # as large as OpenCV's
        texts = sv.RichLabelAnnotator(font_path=font.path, font_size=size, **options)
    scene = np.ascontiguousarray(image[..., ::-1])  # supervision draws on BGR
    scene = texts.annotate(boxes.annotate(scene, detections), detections, labels=labels)
    return np.ascontiguousarray(scene[..., ::-1])
