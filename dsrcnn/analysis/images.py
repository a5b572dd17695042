"""Trained models, and the images to run them on."""

from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.engine import DefaultPredictor
from torch import Tensor

from ..config.validate import architecture_of
from ..data.build import load_records as load_checked_records
from ..data.datasets.custom import require_class_names
from ..data.mapper import DetectionMapper
from ..data.transforms.geometric import Resize
from ..engine.checkpoint import load_trained, without_weights
from ..errors import ConfigError, DataError
from ..visualization.draw import evenly_spaced


class Report(NamedTuple):
    """Pictures, and numbers by name: means over the images drawn."""

    files: list[Path]
    statistics: dict[str, float]


def require_architecture(cfg: CfgNode, base: type, command: str) -> None:
    """Raise a `ConfigError` unless ``MODEL.META_ARCHITECTURE`` is `base` or a subclass."""
    if not issubclass(architecture_of(cfg), base):
        raise ConfigError(
            f"{command} needs {base.__name__} or a subclass of it, but MODEL.META_ARCHITECTURE is "
            f"{cfg.MODEL.META_ARCHITECTURE}. Use it with another config."
        )


def load_predictor(cfg: CfgNode) -> DefaultPredictor:
    """Build Detectron2's predictor, with an error instead of partly random weights.

    Raises:
        WeightsError: if ``MODEL.WEIGHTS`` is missing or does not fill the whole model.
    """
    predictor = DefaultPredictor(without_weights(cfg))
    predictor.aug = Resize(predictor.aug)
    load_trained(predictor.model, cfg)
    return predictor


def load_records(cfg: CfgNode, split: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Load the records and class names of the first dataset of ``DATASETS.<split>``.

    Raises:
        DataError: if there is none, or it cannot be read.
    """
    names = cfg.DATASETS[split]
    if not names:
        raise DataError(
            f"DATASETS.{split} is empty, so there are no images to draw. Write a registered name, "
            f"or DATASETS.CUSTOM.{split}_JSON and {split}_IMAGES."
        )
    records = load_checked_records(names[0], for_training=split == "TRAIN")
    return records, require_class_names(names[0])


def training_images(cfg: CfgNode, count: int) -> list[dict[str, Any]]:
    """Load `count` annotated training images as model inputs of an evaluation, with ``instances``.

    Raises:
        DataError: if the training set cannot be read or has no annotation.
    """
    records = [r for r in load_records(cfg, "TRAIN")[0] if r["annotations"]]
    if not records:
        raise DataError(
            f"No image of {cfg.DATASETS.TRAIN[0]} has an annotation, so there is nothing to draw."
        )
    mapper = DetectionMapper(cfg, is_train=False, keep_annotations=True)
    return [mapper(records[index]) for index in evenly_spaced(len(records), count)]


def as_bgr(image: Tensor, order: str) -> np.ndarray:
    """Convert a model input (3, H, W) to (H, W, 3) uint8 BGR; `order` is ``INPUT.FORMAT``."""
    array = image.permute(1, 2, 0).byte().cpu().numpy()
    return np.ascontiguousarray(array[..., ::-1] if order == "RGB" else array)


def encode_image(image: np.ndarray, ending: str, quality: int = 95) -> bytes:
    """Encode a BGR image; `quality` is that of JPEG files.

    Raises:
        DataError: if the format does not take it, such as more than 65,500 pixels a side.
    """
    is_jpeg = ending.lower() in (".jpg", ".jpeg")  # others do not know the option
    options = [cv2.IMWRITE_JPEG_QUALITY, quality] if is_jpeg else []
    try:
        done, content = cv2.imencode(ending, image, options)
        reason = "the format does not take this size"
    except cv2.error as error:  # an unknown ending
        done, reason = False, " ".join(str(error).split())
    if not done:
        height, width = image.shape[:2]
        raise DataError(
            f"A picture of {width}x{height} pixels cannot be written as {ending}: {reason}."
        )
    return content.tobytes()


def shrunk(image: np.ndarray, side: int) -> tuple[np.ndarray, float]:
    """Shrink an image to a longer side of at most `side` pixels; returns it and the factor."""
    factor = min(1.0, side / max(image.shape[:2]))
    if factor == 1:
        return image, factor
    height, width = (max(1, round(factor * extent)) for extent in image.shape[:2])
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA), factor


def save_image(path: Path, image: np.ndarray) -> Path:
    """Write a BGR image, with its folder, and return the path.

    Raises:
        DataError: if it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_image(image, path.suffix))
    except OSError as error:
        raise DataError(f"Picture {path} cannot be written: {error.strerror}.") from error
    return path
