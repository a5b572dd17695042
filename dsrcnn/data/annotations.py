"""What makes a box annotation usable, and the size of the image it is in."""

import math
from pathlib import Path

from detectron2.structures import BoxMode
from PIL import Image

__all__ = ["box_fault", "shown_size", "turned_size"]

_ORIENTATION = 0x0112  # of EXIF


def box_fault(annotation: dict, height: int | None = None, width: int | None = None) -> str | None:
    """Why the box of an annotation cannot be learned; None if it can.

    Args:
        annotation: Detectron2's annotation with ``bbox`` and ``bbox_mode``.
        height: of the image in pixels, if known.
        width: likewise.
    """
    box = annotation["bbox"]
    if len(box) != 4:
        return f"{len(box)} numbers instead of 4"
    if not all(isinstance(v, (int, float)) and math.isfinite(v) for v in map(_plain, box)):
        return "not finite"
    x1, y1, x2, y2 = BoxMode.convert(
        [float(v) for v in box], annotation["bbox_mode"], BoxMode.XYXY_ABS
    )
    if x2 <= x1 or y2 <= y1:
        return "no area"
    if x2 <= 0 or y2 <= 0 or (width and x1 >= width) or (height and y1 >= height):
        return "outside the image"
    return None


def _plain(value: object) -> object:
    """A numpy scalar as a Python number."""
    return value.item() if hasattr(value, "item") else value


def shown_size(path: Path) -> tuple[int, int]:
    """Width and height of an image file as it is loaded: turned as its EXIF data say."""
    with Image.open(path) as image:
        return turned_size(image)


def turned_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of an open image once it is turned as its EXIF data say."""
    width, height = image.size
    return (height, width) if image.getexif().get(_ORIENTATION) in (5, 6, 7, 8) else (width, height)
