"""Rotation, scale, shift, shear and perspective in one warp."""

from collections.abc import Sequence

import numpy as np
from detectron2.data import transforms as T

from .photometric import opencv

__all__ = ["RandomWarp", "WarpTransform"]


class WarpTransform(T.Transform):
    """A projective map of the image onto a canvas.

    A box becomes the box around its four corners. Straight lines stay straight, so it contains
    what was in the box before.

    Attributes:
        matrix: (3, 3), of homogeneous pixel coordinates; the upper left corner is (0, 0).
        size: of the canvas, height and width.
    """

    def __init__(
        self, matrix: np.ndarray, size: tuple[int, int], fill: Sequence[float] = (0, 0, 0)
    ) -> None:
        """Set the map and the colour of what lies outside the image."""
        super().__init__()
        self.matrix = matrix
        self.size = size
        self.fill = tuple(float(v) for v in fill)

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """(H, W, C) to the canvas."""
        return self._warp(img, self.fill, opencv().INTER_LINEAR)

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """(H, W) of labels to the canvas, 0 outside."""
        return self._warp(segmentation, (0,), opencv().INTER_NEAREST)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """(N, 2) x, y."""
        homogeneous = np.concatenate([coords, np.ones((len(coords), 1))], axis=1) @ self.matrix.T
        return homogeneous[:, :2] / homogeneous[:, 2:]

    def _warp(self, image: np.ndarray, fill: Sequence[float], interpolation: int) -> np.ndarray:
        # OpenCV counts from the middle of the first pixel, boxes from its corner.
        half = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
        matrix = np.linalg.inv(half) @ self.matrix @ half
        height, width = self.size
        warped: np.ndarray = opencv().warpPerspective(
            np.ascontiguousarray(image), matrix, (width, height), flags=interpolation,
            borderValue=fill,
        )  # fmt: skip
        return warped


class RandomWarp(T.Augmentation):
    """A warp around the centre of the image, which keeps its size."""

    def __init__(
        self,
        *,
        degrees: float = 10.0,
        scale: tuple[float, float] = (0.8, 1.2),
        translate: float = 0.1,
        shear: float = 0.0,
        perspective: float = 0.0,
        fill: Sequence[float] = (0, 0, 0),
    ) -> None:
        """Set the largest changes.

        Args:
            degrees: of rotation, either way.
            scale: smallest and largest factor.
            translate: shift as a share of the image's sides, either way.
            shear: degrees by which each axis leans, either way.
            perspective: by how much the edges of the image come nearer or go further, as a share of
                the distance; below 0.5.
            fill: colour of what lies outside.
        """
        super().__init__()
        self.degrees, self.scale, self.translate = degrees, scale, translate
        self.shear, self.perspective, self.fill = shear, perspective, fill

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """Draw the warp."""
        height, width = image.shape[:2]
        angle = np.deg2rad(np.random.uniform(-1, 1) * self.degrees)
        factor = np.random.uniform(*self.scale)
        lean_x, lean_y = np.tan(np.deg2rad(np.random.uniform(-1, 1, 2) * self.shear))
        shift = np.random.uniform(-1, 1, 2) * self.translate * (width, height)
        depth = np.random.uniform(-1, 1, 2) * self.perspective / (width / 2, height / 2) / 2
        cos, sin = factor * np.cos(angle), factor * np.sin(angle)
        rotation = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
        leaning = np.array([[1, lean_x, 0], [lean_y, 1, 0], [0, 0, 1]])
        tilting = np.array([[1, 0, 0], [0, 1, 0], [*depth, 1]])
        centre = np.array([width / 2, height / 2])
        matrix = _moved(centre + shift) @ rotation @ leaning @ tilting @ _moved(-centre)
        return WarpTransform(matrix, (height, width), self.fill)


def _moved(by: np.ndarray) -> np.ndarray:
    return np.array([[1, 0, by[0]], [0, 1, by[1]], [0, 0, 1]])
