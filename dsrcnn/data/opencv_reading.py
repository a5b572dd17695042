"""Decoding and resizing by OpenCV, which takes less time than Pillow does."""

from pathlib import Path

import numpy as np
from detectron2.data import transforms as T

from .augmentation.photometric import opencv

__all__ = ["ResizeByOpenCV", "decode_jpeg", "use_one_thread"]


def decode_jpeg(path: str | Path, image_format: str) -> np.ndarray | None:
    """Pixels of a whole JPEG file, turned as its EXIF data say; the same as Pillow's.

    Args:
        path: of the file.
        image_format: ``RGB`` or ``BGR``.

    Returns:
        (H, W, 3) uint8; None for what is left to Pillow: other formats, files that are missing, and
        those that are cut off, which OpenCV would fill up with grey.
    """
    try:
        content = Path(path).read_bytes()
    except OSError:
        return None
    whole = content[:2] == b"\xff\xd8" and content[-64:].rstrip(b"\0\r\n").endswith(b"\xff\xd9")
    if not whole or image_format not in ("RGB", "BGR"):
        return None
    cv2 = opencv()
    image: np.ndarray | None = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    if image is None or image_format == "BGR":
        return image
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB))


class ResizeByOpenCV(T.Augmentation):
    """Another augmentation that resizes, with OpenCV's interpolation.

    Means over areas where an image gets smaller, bilinear where it gets larger.
    """

    def __init__(self, augmentation: T.Augmentation) -> None:
        """Set what chooses the size, such as ``ResizeShortestEdge``."""
        super().__init__()
        self.augmentation = augmentation

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """The size that the other one chooses."""
        chosen = self.augmentation.get_transform(image)
        if not isinstance(chosen, T.ResizeTransform):
            return chosen
        return _OpenCVResize(chosen.h, chosen.w, chosen.new_h, chosen.new_w, chosen.interp)


class _OpenCVResize(T.ResizeTransform):
    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        if interp is not None or img.dtype != np.uint8:  # masks
            return np.asarray(super().apply_image(img, interp))
        cv2 = opencv()
        smaller = self.new_h * self.new_w < self.h * self.w
        how = cv2.INTER_AREA if smaller else cv2.INTER_LINEAR
        return np.asarray(cv2.resize(img, (self.new_w, self.new_h), interpolation=how))


def use_one_thread(worker: int) -> None:
    """Keep OpenCV in a loader worker from taking the threads of all others."""
    del worker
    try:
        import cv2
    except ImportError:
        return
    cv2.setNumThreads(0)  # 1 would wait for threads that the fork did not bring along
