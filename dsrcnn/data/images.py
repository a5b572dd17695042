"""Image files: the same 8-bit pixels for training, evaluation and pictures, or one error."""

import io
import warnings
from pathlib import Path
from typing import IO, Any

import cv2
import numpy as np
from detectron2.data import detection_utils
from detectron2.utils.file_io import PathManager
from PIL import Image

from ..errors import DataError
from .files import file_fault

_EXIF_ORIENTATION = 0x0112
_TIFF_WIDTH, _TIFF_HEIGHT = 0x0100, 0x0101
_16_BITS = ("PNG", "PPM")  # formats with 16 bits in Pillow's mode "I"

# Pillow warns of images that are read nevertheless, such as large ones; those of twice its limit
# are refused. Threads read images, and a filter is the same for all of them.
for _category in (UserWarning, RuntimeWarning):
    warnings.filterwarnings("ignore", category=_category, module=r"PIL\.")


def allow_large_images() -> None:
    """Let this process read images of up to 2**30 pixels, as OpenCV does, instead of 179 million.

    Pillow refuses larger ones, since a small damaged file may claim any size.
    """
    if Image.MAX_IMAGE_PIXELS is not None:
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, 2**29)  # refuses twice as many


def read_image(record: dict[str, Any], image_format: str, use_opencv: bool = False) -> np.ndarray:
    """Read the image of a record and compare its size with the recorded one, or add its size.

    With `use_opencv`, complete JPEG files are decoded by OpenCV, everything else by Pillow.

    Returns:
        (H, W, 3) uint8.

    Raises:
        DataError: naming the file and its fault.
    """
    name = str(record["file_name"])
    decoded = decode_jpeg(name, image_format) if use_opencv else None
    image = _decode(name, image_format) if decoded is None else decoded
    try:
        detection_utils.check_image_size(record, image)
    except detection_utils.SizeMismatchError as error:
        raise DataError(
            f"Image {name} is {image.shape[1]}x{image.shape[0]} pixels, but its record says "
            f"{record['width']}x{record['height']}; correct the annotations."
        ) from error
    return image


def _decode(name: str, image_format: str) -> np.ndarray:
    """Read pixels with Pillow, rotated by the EXIF orientation."""
    fault = None if "://" in name else file_fault(name)
    if fault:
        raise DataError(f"Image {name} {_cannot_be_read(fault)}.")
    try:
        with PathManager.open(name, "rb") as file, Image.open(file) as opened:
            return pixels_of(opened, image_format)
    except Image.DecompressionBombError as error:
        raise DataError(
            f"Image {name} has more than {2e-6 * (Image.MAX_IMAGE_PIXELS or 0):.0f} million "
            "pixels, the most that is read; predict it in tiles (--tile, in Python tile=1024), "
            "which allows more, or make it smaller."
        ) from error
    except Exception as error:  # decoders raise anything on damaged files
        text = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"Image {name} cannot be read ({text}); replace the file or remove it."
        ) from error


def pixels_of(image: Image.Image, image_format: str = "RGB") -> np.ndarray:
    """Convert a PIL image of any mode to (H, W, 3) uint8, rotated by its EXIF orientation.

    Raises:
        ValueError: for pixels of unknown range.
    """
    return np.asarray(detection_utils.convert_PIL_to_numpy(_to_8_bits(image), image_format))


def _cannot_be_read(fault: str) -> str:
    if fault == "does not exist":
        return f"{fault}; correct its path or remove it"
    return f"cannot be read ({fault}); replace the file or remove it"


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Rotate by the EXIF orientation, and keep the high byte of 16-bit gray pixels.

    So does OpenCV; Pillow would clip them to 255.

    Raises:
        ValueError: for floats and 32-bit integers, whose range is unknown.
    """
    is_wide = image.mode.startswith("I;16") or (image.mode == "I" and image.format in _16_BITS)
    if image.mode in ("I", "F") and not is_wide:
        kind = "float" if image.mode == "F" else "32-bit"
        raise ValueError(f"{kind} pixels of unknown range; save it with 8 or 16 bits per channel")
    image.load()  # reading EXIF data would load it as well, and hide errors
    rotated = detection_utils._apply_exif_orientation(image)
    return Image.fromarray((np.asarray(rotated) >> 8).astype(np.uint8)) if is_wide else rotated


def decode_jpeg(path: str | Path, image_format: str) -> np.ndarray | None:
    """Decode a complete JPEG file with OpenCV, rotated by its EXIF orientation as Pillow would.

    Returns:
        (H, W, 3) uint8; None for what Pillow should handle: other formats and color spaces,
        missing files, and truncated ones, which OpenCV would silently fill with gray.
    """
    if file_fault(path) or image_format not in ("RGB", "BGR"):
        return None
    try:
        content = Path(path).read_bytes()
        complete = (
            content[:2] == b"\xff\xd8" and content[-64:].rstrip(b"\0\r\n")[-2:] == b"\xff\xd9"
        )
        opened = Image.open(io.BytesIO(content))
        # OpenCV converts CMYK in another way, and does not know orientations in XMP data.
        if not complete or opened.mode not in ("L", "RGB") or _is_rotated_by_xmp(opened):
            return None
        image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    except Exception:  # Pillow explains it
        return None
    if image is None or image_format == "BGR":
        return image
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _is_rotated_by_xmp(image: Image.Image) -> bool:
    """Whether the orientation of an image may come from its XMP data, as Pillow reads it."""
    return "xmp" in image.info and image.getexif().get(_EXIF_ORIENTATION, 1) != 1


def image_file_size(file: Path | IO[bytes], *, decode: bool = False) -> tuple[int, int]:
    """Read width and height of an image after rotation by its EXIF orientation.

    With `decode`, the pixels are read, too, under the rules of `read_image`.

    Raises:
        ValueError: explaining why it cannot be read.
    """
    fault = file_fault(file) if isinstance(file, Path) else None
    if fault:
        raise ValueError(fault)
    try:
        with Image.open(file) as image:
            if decode:
                return _to_8_bits(image).convert("RGB").size
            width, height = image.size
            try:
                exif = image.getexif()
                is_transposed = exif.get(_EXIF_ORIENTATION) in (5, 6, 7, 8)
                if image.format == "TIFF":  # whose size some versions of Pillow rotate already
                    width, height = exif[_TIFF_WIDTH], exif[_TIFF_HEIGHT]
            except Exception:  # damaged EXIF data, which Detectron2 ignores, too
                is_transposed = False
    except Exception as error:  # decoders raise anything on damaged files
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error
    return (height, width) if is_transposed else (width, height)
