"""Colours, blur and noise; boxes stay where they are. Random numbers are numpy's."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.data import transforms as T

from ...errors import DataError

__all__ = ["RandomBlur", "RandomHSV", "RandomNoise", "opencv"]


def opencv() -> Any:
    """OpenCV, which not everything needs.

    Raises:
        DataError: if it is not installed.
    """
    try:
        import cv2
    except ImportError as error:
        raise DataError(
            "INPUT.AUG and INPUT.OPENCV need OpenCV, which is not installed. Write: "
            'pip install "dsrcnn[viz]"'
        ) from error
    return cv2


class RandomHSV(T.Augmentation):
    """Hue, saturation and value multiplied by factors around one, each by its own."""

    def __init__(self, strengths: Sequence[float], image_format: str = "RGB") -> None:
        """Set how far factors lie from one at most; hue is a share of the whole circle."""
        super().__init__()
        self.strengths = np.array(strengths, dtype=float)
        self.image_format = image_format

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """Draw the factors."""
        hue, saturation, value = 1 + np.random.uniform(-1, 1, 3) * self.strengths
        return T.ColorTransform(lambda x: _change_hsv(x, hue, saturation, value, self.image_format))


def _change_hsv(
    image: np.ndarray, hue: float, saturation: float, value: float, image_format: str
) -> np.ndarray:
    cv2 = opencv()
    to, back = (
        (cv2.COLOR_RGB2HSV, cv2.COLOR_HSV2RGB)
        if image_format == "RGB"
        else (cv2.COLOR_BGR2HSV, cv2.COLOR_HSV2BGR)
    )
    levels = np.arange(256)
    tables = (
        (levels + (hue - 1) * 180) % 180,  # hues of 8-bit images go from 0 to 179
        np.clip(levels * saturation, 0, 255),
        np.clip(levels * value, 0, 255),
    )
    channels = cv2.split(cv2.cvtColor(np.ascontiguousarray(image), to))
    changed = [cv2.LUT(c, t.astype(np.uint8)) for c, t in zip(channels, tables, strict=True)]
    return cv2.cvtColor(cv2.merge(changed), back)


class RandomBlur(T.Augmentation):
    """A Gaussian, median or box filter of odd width."""

    def __init__(self, max_size: int = 5) -> None:
        """Set the largest width; the smallest is 3."""
        super().__init__()
        self.max_size = max_size

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """Draw filter and width."""
        size = int(np.random.choice(np.arange(3, self.max_size + 1, 2)))
        kind = np.random.randint(3)
        return T.ColorTransform(lambda x: _blur(x, kind, size))


def _blur(image: np.ndarray, kind: int, size: int) -> np.ndarray:
    cv2 = opencv()
    image = np.ascontiguousarray(image)
    if kind == 0:
        return cv2.GaussianBlur(image, (size, size), 0)
    return cv2.medianBlur(image, size) if kind == 1 else cv2.blur(image, (size, size))


class RandomNoise(T.Augmentation):
    """Gaussian noise, independent for every pixel and channel."""

    def __init__(self, max_sigma: float = 15.0) -> None:
        """Set the largest standard deviation, in grey levels; the smallest is 1."""
        super().__init__()
        self.max_sigma = max_sigma

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """Draw the noise."""
        sigma = np.random.uniform(1.0, max(self.max_sigma, 1.0))
        noise = np.random.normal(0.0, sigma, image.shape).astype(np.float32)
        return T.ColorTransform(lambda x: np.clip(x + noise, 0, 255).astype(np.uint8))
