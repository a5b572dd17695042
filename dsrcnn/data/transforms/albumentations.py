"""Transforms of Albumentations (the MIT-licensed 2.0), listed in the config."""

import difflib
import os
import random
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.structures import BoxMode

from ...errors import ConfigError, DataError
from ..datasets.validate import to_xyxy

_KEY = "INPUT.AUG.ALBUMENTATIONS"


class AlbumentationsAdapter:
    """Applies Albumentations transforms to an image and its annotations.

    Their random numbers follow from numpy's state, like those of all other augmentations.

    Args:
        transforms: names with arguments, such as ``{"name": "CLAHE", "p": 0.3}``; a transform
            that contains others, such as ``OneOf``, lists them under ``transforms``.
        image_format: channel order of the images; Albumentations gets RGB.
        min_visible: least fraction of a box inside the image; boxes below it are dropped.

    Raises:
        ConfigError: if the package is missing, or has no such transform or argument.
    """

    def __init__(
        self, transforms: Sequence[dict], *, image_format: str = "RGB", min_visible: float = 0.0
    ) -> None:
        library = _import_albumentations()
        self.is_bgr = image_format == "BGR"
        options: dict[str, Any] = {"label_fields": ["indices"], "min_visibility": min_visible}
        options |= {"clip": True, "filter_invalid_bboxes": True}  # invalid: outside the image
        boxes = library.BboxParams("pascal_voc", **options)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*no transform to process it", UserWarning)
            built = [_build(library, entry) for entry in transforms]
            self.transforms = library.Compose(built, bbox_params=boxes)

    def __call__(
        self, image: np.ndarray, annotations: Sequence[dict[str, Any]]
    ) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """Transform an image (H, W, 3) uint8 and its annotations, whose boxes must be usable.

        Returns:
            The transformed image and the remaining annotations with transformed boxes.

        Raises:
            DataError: if a transform fails, or does not return a (H, W, 3) uint8 image.
        """
        height, width = image.shape[:2]
        boxes = np.array([to_xyxy(a) for a in annotations], dtype=float).reshape(-1, 4)
        # One stream for all transforms: `set_random_seed` gives each the same one, so that two
        # flips happen together or not at all.
        seed = int(np.random.randint(2**31))
        self.transforms.set_random_state(np.random.default_rng(seed), random.Random(seed))
        try:
            result = self.transforms(
                image=self._flip_channels(image),
                bboxes=boxes.clip(0, [width, height] * 2),
                indices=np.arange(len(boxes)),
            )
        except Exception as error:  # the errors of its transforms have no common class
            fault = f"fails on an image of {width}x{height} pixels: {error}"
            raise DataError(f"{_KEY} {fault}") from error
        image = result["image"]
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape[2:] != (3,):
            shape = tuple(getattr(image, "shape", ()))
            raise DataError(
                f"{_KEY} returns {type(image).__name__} {shape} of {image.dtype} instead of "
                "(H, W, 3) uint8; remove transforms that normalize or make tensors, which the "
                "model does itself."
            )
        kept = [
            {**annotations[int(index)], "bbox": box.tolist(), "bbox_mode": BoxMode.XYXY_ABS}
            for box, index in zip(result["bboxes"], result["indices"], strict=True)
        ]
        return self._flip_channels(image), kept

    def _flip_channels(self, image: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(image[..., ::-1]) if self.is_bgr else image


def _import_albumentations() -> Any:
    # Without it, importing looks for a newer version online, which has another license.
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    try:
        import albumentations
    except ImportError as error:
        raise ConfigError(
            f"{_KEY} needs the package albumentations, which is not installed: "
            "pip install 'dsrcnn[albumentations]'."
        ) from error
    return albumentations


def _build(library: Any, entry: dict[str, Any]) -> Any:
    if not isinstance(entry, dict) or "name" not in entry:
        raise ConfigError(
            f"{_KEY} has the entry {entry!r}; write a name with its arguments, such as "
            "{name: CLAHE, p: 0.3}."
        )
    arguments = {key: value for key, value in entry.items() if key != "name"}
    if "transforms" in arguments:
        inner = arguments["transforms"]
        if not isinstance(inner, (list, tuple)):
            raise ConfigError(f"{_KEY}: {entry['name']} has transforms {inner!r}; write a list.")
        arguments["transforms"] = [_build(library, each) for each in inner]
    transform: Any = getattr(library, str(entry["name"]), None)
    if not _is_transform(library, transform):
        names = [n for n, value in vars(library).items() if _is_transform(library, value)]
        close = difflib.get_close_matches(str(entry["name"]), names)
        hint = f"; did you mean {' or '.join(close)}?" if close else "."
        raise ConfigError(f"{_KEY}: Albumentations has no transform {entry['name']!r}{hint}")
    with warnings.catch_warnings():
        # Albumentations only warns of an unknown argument.
        warnings.filterwarnings("error", ".*not valid for transform", UserWarning)
        try:
            built = transform(**arguments)
            _ = getattr(built, "targets", None)  # raises for a mere base class
            return built
        except Exception as error:  # of many classes
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ConfigError(f"{_KEY}: {entry['name']} cannot be built: {reason}") from error


def _is_transform(library: Any, value: object) -> bool:
    kinds = library.BasicTransform, library.BaseCompose
    return isinstance(value, type) and issubclass(value, kinds)
