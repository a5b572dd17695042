"""Color changes, blur and noise, which leave boxes alone. Random numbers are numpy's."""

from dataclasses import dataclass

import cv2
import numpy as np
from detectron2.data import transforms as T

_HSV_STRENGTHS = (0.014, 0.68, 0.36)  # largest relative changes; of hue, fraction of the circle
_BLUR_SIZES = (3, 5)  # pixels
_NOISE_SIGMAS = (1.0, 15.0)  # gray levels


@dataclass(eq=False, repr=False)
class RandomHSV(T.Augmentation):
    """Multiplies hue, saturation and value by independent random factors around 1."""

    image_format: str  # ``RGB`` or ``BGR``

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """Draw the factors."""
        hue, saturation, value = 1 + np.random.uniform(-1, 1, 3) * _HSV_STRENGTHS
        return T.ColorTransform(lambda x: _scale_hsv(x, hue, saturation, value, self.image_format))


def _scale_hsv(
    image: np.ndarray, hue: float, saturation: float, value: float, image_format: str
) -> np.ndarray:
    to, back = cv2.COLOR_BGR2HSV, cv2.COLOR_HSV2BGR
    if image_format == "RGB":
        to, back = cv2.COLOR_RGB2HSV, cv2.COLOR_HSV2RGB
    levels = np.arange(256)
    tables = (
        (levels + (hue - 1) * 180) % 180,  # hues of 8-bit images are 0 to 179
        np.clip(levels * saturation, 0, 255),
        np.clip(levels * value, 0, 255),
    )
    channels = cv2.split(cv2.cvtColor(np.ascontiguousarray(image), to))
    scaled = [cv2.LUT(c, t.astype(np.uint8)) for c, t in zip(channels, tables, strict=True)]
    return cv2.cvtColor(cv2.merge(scaled), back)


class RandomBlur(T.Augmentation):
    """Applies a Gaussian, median or box filter."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """Draw the size and kind of the filter."""
        size = int(np.random.choice(_BLUR_SIZES))
        kind = np.random.randint(3)
        return T.ColorTransform(lambda x: _blur(x, kind, size))


def _blur(image: np.ndarray, kind: int, size: int) -> np.ndarray:
    image = np.ascontiguousarray(image)
    if kind == 0:
        return cv2.GaussianBlur(image, (size, size), 0)
    return cv2.medianBlur(image, size) if kind == 1 else cv2.blur(image, (size, size))


class RandomNoise(T.Augmentation):
    """Adds Gaussian noise, independent for every pixel and channel."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """Draw the noise and its standard deviation."""
        sigma = np.random.uniform(*_NOISE_SIGMAS)
        noise = np.random.normal(0.0, sigma, image.shape).astype(np.float32)
        return T.ColorTransform(lambda x: np.clip(x + noise, 0, 255).astype(np.uint8))
