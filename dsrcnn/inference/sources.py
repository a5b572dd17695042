"""Images to predict: files, folders, patterns, images in memory, videos and cameras."""

import glob
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from ..data.files import IMAGE_SUFFIXES, image_files
from ..data.images import pixels_of, read_image
from ..errors import DataError
from .videos import VideoFrame, decode, is_live, is_video, latest

_EXPECTED = (
    "a path, a pattern, a folder, a PIL image, an array (H, W, 3), a tensor (3, H, W), the number "
    "of a camera, or a list of them"
)


class Frame(NamedTuple):
    """An image, and where it comes from.

    Attributes:
        image: (H, W, 3) uint8 RGB; None for a large file that need not be kept.
        path: file of the image or video; None for an image in memory or a camera.
        number: of the frame in a video or camera, from 0; None for other images.
        seconds: since the first frame of a camera or stream; None for others.
    """

    image: np.ndarray | None
    path: str | None = None
    number: int | None = None
    seconds: float | None = None


Reader = Callable[[], Frame]  # reads an image, maybe in another thread; may raise a `DataError`


def is_single(source: Any) -> bool:
    """Whether a source is one image, so that its prediction is one result and not a list."""
    if isinstance(source, (str, os.PathLike)):
        path = str(source)
        return not (os.path.isdir(path) or _is_pattern(path) or is_video(path))
    if isinstance(source, (np.ndarray, torch.Tensor)):
        return source.ndim < 4
    return isinstance(source, Image.Image)


def has_live(source: Any) -> bool:
    """Whether a source is, or a list of sources has, a camera or stream, which has no end."""
    if isinstance(source, (list, tuple)):
        return any(map(has_live, source))
    # Others match no camera, and may be slow to search.
    if isinstance(source, str) and source.startswith("/dev/") and _is_pattern(source):
        return any(map(is_live, glob.glob(source, recursive=True)))
    return is_live(source)


def readers(source: Any, *, bgr: bool = False) -> Generator[Reader, None, None]:
    """List the images of a source, in order, as functions that read them.

    Frames of videos and cameras are decoded by this iterator, one after the other. Of a camera or
    stream it takes the newest one when it is asked.

    Args:
        source: a path of an image or video, a pattern such as ``photos/*.jpg``, a folder (all
            images in it and below, sorted), a PIL image, an array (H, W), (H, W, 3) or (H, W, 4) of
            uint8, a tensor (3, H, W) of uint8 or of floats in 0..1, the number of a camera, the
            address of a stream (``rtsp://...``), or an iterable of any of them.
        bgr: channel order of arrays.

    Raises:
        DataError: for a source of another type, or one that has no images.
    """
    if is_live(source):
        yield from _frames(latest(source), source)
    elif isinstance(source, (str, os.PathLike)):
        yield from _readers_of_path(os.fspath(source))
    elif isinstance(source, (bool, float, bytes, dict)) or source is None:
        raise DataError(f"The source is {source!r}; give {_EXPECTED}.")
    elif isinstance(source, (Image.Image, np.ndarray, torch.Tensor)):
        if not isinstance(source, Image.Image) and source.ndim == 4:
            for image in source:
                yield _reader_of_image(image, bgr)
        else:
            yield _reader_of_image(source, bgr)
    elif isinstance(source, Iterable):
        is_list = isinstance(source, (list, tuple))
        for part in source:
            try:
                if not is_list and has_live(part):  # unknown before, so images would be read ahead
                    raise DataError(
                        f"The source {part!r} comes from an iterator; give cameras and streams "
                        "alone or in a list."
                    )
                yield from readers(part, bgr=bgr)
            except DataError as error:  # the others are predicted
                yield _failing(error)
    else:
        raise DataError(f"The source is of type {type(source).__name__}; give {_EXPECTED}.")


def _readers_of_path(path: str) -> Iterator[Reader]:
    if os.path.isdir(path):
        files = image_files(Path(path))
        if not files:
            raise DataError(
                f"Folder {path!r} has no image ({', '.join(IMAGE_SUFFIXES[:4])}, ...) in it or "
                "below. Correct the path."
            )
        for file in files:
            yield _reader_of_file(file)
    elif _is_pattern(path):
        matches = sorted(glob.glob(path, recursive=True))
        if not matches:
            raise DataError(f"No file matches {path!r}. Correct the pattern.")
        for match in matches:
            try:
                yield from _readers_of_path(match)
            except DataError as error:  # the others are predicted
                yield _failing(error)
    elif is_live(path):  # matched by a pattern
        yield from _frames(latest(path), path)
    elif is_video(path):
        yield from _frames(decode(path), path)
    else:
        yield _reader_of_file(path)


def source_files(path: str) -> list[str]:
    """List the files of a path, pattern or folder, in the order of `readers`, unread."""
    if os.path.isdir(path):
        return image_files(Path(path))
    if not _is_pattern(path):
        return [path]
    return [
        file for match in sorted(glob.glob(path, recursive=True)) for file in source_files(match)
    ]


def _is_pattern(path: str) -> bool:
    return glob.has_magic(path) and "://" not in path and not os.path.exists(path)


def _reader_of_file(path: str) -> Reader:
    return lambda: Frame(read_image({"file_name": path}, "RGB"), path)


def _reader_of_image(image: Any, bgr: bool) -> Reader:
    """Read an image in memory, as it is now: a program may reuse the memory for the next one."""
    if isinstance(image, Image.Image):  # a copy would lose the orientation of some formats
        try:
            frame = Frame(to_rgb(image))
        except DataError as error:
            return _failing(error)
        return lambda: frame
    copied = image.clone() if isinstance(image, torch.Tensor) else image.copy()
    return lambda: Frame(to_rgb(copied, bgr=bgr))


def _failing(error: DataError) -> Reader:
    def read() -> Frame:
        raise error

    return read


def to_rgb(image: Any, *, bgr: bool = False) -> np.ndarray:
    """Convert an image in memory to (H, W, 3) uint8 RGB; see `readers`.

    Raises:
        DataError: for another type, shape or range.
    """
    if isinstance(image, Image.Image):
        try:
            pixels = pixels_of(image)
        except Exception as error:  # a damaged file that is decoded now
            text = " ".join(str(error).split()) or type(error).__name__
            raise DataError(f"The PIL image cannot be used ({text}).") from error
    elif isinstance(image, torch.Tensor):
        pixels = _pixels_of_tensor(image)
    else:
        pixels = image
        if pixels.dtype != np.uint8:
            raise DataError(
                f"The array has values of type {pixels.dtype}; give uint8 from 0 to 255, or a "
                "tensor of floats from 0 to 1."
            )
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = np.repeat(pixels, 3, axis=2)
    if pixels.ndim != 3 or pixels.shape[2] not in (3, 4) or 0 in pixels.shape:
        raise DataError(
            f"The image has shape {tuple(image.shape)}; give an array (H, W), (H, W, 3) or "
            "(H, W, 4), or a tensor (3, H, W)."
        )
    is_array = isinstance(image, np.ndarray)
    return np.ascontiguousarray(pixels[..., 2::-1] if bgr and is_array else pixels[..., :3])


def _pixels_of_tensor(image: torch.Tensor) -> np.ndarray:
    """Convert (C, H, W) to (H, W, C) uint8."""
    if image.is_floating_point():
        low, high = (image.min().item(), image.max().item()) if image.numel() else (0.0, 0.0)
        if not (low >= 0 and high <= 1):  # NaN included
            raise DataError(
                f"The tensor has values from {low:.4g} to {high:.4g}; give floats from 0 to 1, or "
                "uint8 from 0 to 255."
            )
        image = (image * 255).round().to(torch.uint8)
    if image.dtype != torch.uint8:
        raise DataError(
            f"The tensor has values of type {image.dtype}; give uint8, or floats from 0 to 1."
        )
    if image.ndim == 3:
        image = image.permute(1, 2, 0)
    return image.detach().cpu().numpy()


def _frames(images: Generator[VideoFrame, None, None], source: str | int) -> Iterator[Reader]:
    """Number the frames of a video, camera or stream; a fault is one more reader, which fails."""
    path = source if isinstance(source, str) else None
    with closing(images):
        number = 0
        try:
            for number, (image, seconds) in enumerate(images, start=1):
                frame = Frame(image, path, number - 1, seconds)
                yield lambda frame=frame: frame  # type: ignore[misc]
        except DataError as error:
            if not number:
                raise
            yield _failing(error)
