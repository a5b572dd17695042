"""Transforms of the library Albumentations (the MIT-licensed 2.0), listed in a config."""

import difflib
import os
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.structures import BoxMode

from ...errors import ConfigError, DataError

__all__ = ["AlbumentationsAdapter"]

_KEY = "INPUT.AUG.ALBUMENTATIONS"


class AlbumentationsAdapter:
    """Applies a list of Albumentations' transforms to an image with its annotations.

    The random numbers follow from numpy's state, as those of all augmentation here do.
    """

    def __init__(
        self,
        transforms: Sequence[dict[str, Any]],
        *,
        image_format: str = "RGB",
        min_visible: float = 0.0,
    ) -> None:
        """Build the transforms.

        Args:
            transforms: each a name with its arguments, ``{"name": "CLAHE", "p": 0.3}``; those that
                choose among others, such as ``OneOf``, have these under ``transforms``.
            image_format: order of the images' channels; Albumentations is given RGB.
            min_visible: a box is left out if less of it remains in the image.

        Raises:
            ConfigError: if the library is missing, or has no such transform or argument.
        """
        library = _library()
        self.reverse_channels = image_format == "BGR"
        boxes = library.BboxParams(
            "pascal_voc",
            label_fields=["numbers"],
            clip=True,
            min_visibility=min_visible,
            filter_invalid_bboxes=True,  # those outside the image
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*no transform to process it", UserWarning)
            self.transforms = library.Compose(
                [_build(library, entry) for entry in transforms], bbox_params=boxes
            )

    def __call__(
        self, image: np.ndarray, annotations: Sequence[dict[str, Any]]
    ) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """Transform an image and the boxes in it.

        Args:
            image: (H, W, 3) uint8.
            annotations: Detectron2's, with usable boxes.

        Returns:
            The new image, and the annotations that are left, with new boxes.

        Raises:
            DataError: if a transform fails on this image or returns no such image.
        """
        height, width = image.shape[:2]
        boxes = np.array([_corners(a) for a in annotations], dtype=float).reshape(-1, 4)
        self.transforms.set_random_seed(int(np.random.randint(2**31)))
        try:
            found = self.transforms(
                image=self._reordered(image),
                bboxes=boxes.clip(0, [width, height] * 2),
                numbers=np.arange(len(boxes)),
            )
        except Exception as error:  # its errors have no common class
            raise DataError(
                f"{_KEY} fails on an image of {width}x{height} pixels: {error}"
            ) from error
        new = found["image"]
        if not isinstance(new, np.ndarray) or new.dtype != np.uint8 or new.shape[2:] != (3,):
            raise DataError(
                f"{_KEY} returns {_kind(new)} instead of (H, W, 3) uint8; remove transforms "
                "that normalize or make tensors, which the model does itself."
            )
        kept = [
            {**annotations[int(number)], "bbox": box.tolist(), "bbox_mode": BoxMode.XYXY_ABS}
            for box, number in zip(found["bboxes"], found["numbers"], strict=True)
        ]
        return self._reordered(new), kept

    def _reordered(self, image: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(image[..., ::-1]) if self.reverse_channels else image


def _corners(annotation: dict[str, Any]) -> list[float]:
    box = [float(v) for v in annotation["bbox"]]
    corners: list[float] = BoxMode.convert(box, annotation["bbox_mode"], BoxMode.XYXY_ABS)
    return corners


def _kind(image: Any) -> str:
    return f"{type(image).__name__} {tuple(getattr(image, 'shape', ()))} of {image.dtype}"


def _library() -> Any:
    # It would ask the network for a newer version, which has another licence.
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
        arguments["transforms"] = [_build(library, inner) for inner in arguments["transforms"]]
    kind = getattr(library, str(entry["name"]), None)
    if not isinstance(kind, type):
        near = difflib.get_close_matches(str(entry["name"]), dir(library))
        hint = f"; did you mean {' or '.join(near)}?" if near else "."
        raise ConfigError(f"{_KEY}: Albumentations has no transform {entry['name']!r}{hint}")
    with warnings.catch_warnings():
        # An argument that it does not know is but a warning there.
        warnings.filterwarnings("error", ".*not valid for transform", UserWarning)
        try:
            return kind(**arguments)
        except (TypeError, ValueError, UserWarning) as error:
            raise ConfigError(f"{_KEY}: {entry['name']} cannot be built: {error}") from error
