"""Random warps (rotation, scale, shift, shear, perspective) and resizing with OpenCV."""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from detectron2.data import transforms as T

ROUNDING = 1e-6  # relative error of areas that are computed in two ways


class WarpTransform(T.Transform):
    """Projective transform of an image onto a canvas.

    A box becomes the bounding box of its four transformed corners. Lines stay straight, so it
    contains what the original box contained.

    Attributes:
        matrix: (3, 3), for homogeneous pixel coordinates with (0, 0) at the upper left corner.
        size: height and width of the canvas.
        fill: color outside the image.
    """

    def __init__(
        self, matrix: np.ndarray, size: tuple[int, int], fill: Sequence[float] = (0, 0, 0)
    ) -> None:
        super().__init__()
        self.matrix = matrix
        self.size = size
        self.fill = tuple(float(v) for v in fill)

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """Warp an image (H, W, C)."""
        return self._warp(img, self.fill, cv2.INTER_LINEAR)

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Warp a label map (H, W); 0 outside."""
        return self._warp(segmentation, (0,), cv2.INTER_NEAREST)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Transform points (N, 2), x and y."""
        homogeneous = np.concatenate([coords, np.ones((len(coords), 1))], axis=1) @ self.matrix.T
        return homogeneous[:, :2] / homogeneous[:, 2:]

    def _warp(self, image: np.ndarray, fill: Sequence[float], interpolation: int) -> np.ndarray:
        # The origin of OpenCV is the center of the first pixel, that of boxes its corner.
        half = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
        matrix = np.linalg.inv(half) @ self.matrix @ half
        image, size = np.ascontiguousarray(image), self.size[::-1]
        return cv2.warpPerspective(image, matrix, size, flags=interpolation, borderValue=fill)


@dataclass(kw_only=True, eq=False, repr=False)
class RandomWarp(T.Augmentation):
    """Random warp around the image center; the image keeps its size.

    Attributes:
        degrees: largest rotation, in either direction.
        scale: smallest and largest factor.
        translate: largest shift, as a fraction of the image's sides.
        shear: largest shear angle of either axis, in degrees.
        perspective: largest relative change of the distance to the image's edges; below 0.5.
        fill: color outside the image.
    """

    degrees: float
    scale: tuple[float, float]
    translate: float
    shear: float
    perspective: float
    fill: Sequence[float]

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """Draw the warp."""
        height, width = image.shape[:2]
        angle = np.deg2rad(np.random.uniform(-1, 1) * self.degrees)
        factor = np.random.uniform(*self.scale)
        shear_x, shear_y = np.tan(np.deg2rad(np.random.uniform(-1, 1, 2) * self.shear))
        shift = np.random.uniform(-1, 1, 2) * self.translate * (width, height)
        depth = np.random.uniform(-1, 1, 2) * self.perspective / (width / 2, height / 2) / 2
        cos, sin = factor * np.cos(angle), factor * np.sin(angle)
        rotation = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
        shear = np.array([[1, shear_x, 0], [shear_y, 1, 0], [0, 0, 1]])
        perspective = np.array([[1, 0, 0], [0, 1, 0], [*depth, 1]])
        center = np.array([width / 2, height / 2])
        matrix = _translation(center + shift) @ rotation @ shear @ perspective
        return WarpTransform(matrix @ _translation(-center), (height, width), self.fill)


def _translation(shift: np.ndarray) -> np.ndarray:
    return np.array([[1, 0, shift[0]], [0, 1, shift[1]], [0, 0, 1]])


@dataclass(eq=False, repr=False)
class Resize(T.Augmentation):
    """Resizing augmentation that leaves at least one pixel of narrow images.

    Attributes:
        augmentation: chooses the size, such as ``ResizeShortestEdge``.
        use_opencv: resize with area averages to shrink and bilinear to enlarge, not with Pillow.
    """

    augmentation: T.Augmentation
    use_opencv: bool = False

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """Resize to the size that the wrapped augmentation chooses."""
        chosen = self.augmentation.get_transform(image)
        if not isinstance(chosen, T.ResizeTransform):
            return chosen
        kind = _OpenCVResizeTransform if self.use_opencv else T.ResizeTransform
        sides = max(chosen.new_h, 1), max(chosen.new_w, 1)
        return kind(chosen.h, chosen.w, *sides, chosen.interp)


@dataclass(eq=False, repr=False)
class Crop(T.Augmentation):
    """Random crop of at least one pixel; see ``RandomCrop``."""

    crop_type: str
    crop_size: Sequence[float]

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """Draw the place."""
        height, width = image.shape[:2]
        sizes = T.RandomCrop(self.crop_type, self.crop_size).get_crop_size((height, width))
        h, w = max(sizes[0], 1), max(sizes[1], 1)
        y, x = np.random.randint(height - h + 1), np.random.randint(width - w + 1)
        return T.CropTransform(x, y, w, h)


class _OpenCVResizeTransform(T.ResizeTransform):
    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        if interp is not None or img.dtype != np.uint8:  # masks
            return np.asarray(super().apply_image(img, interp))
        shrinks = self.new_h * self.new_w < self.h * self.w
        interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        return cv2.resize(img, (self.new_w, self.new_h), interpolation=interpolation)
