"""Writing of results while they arrive: pictures, videos, COCO, CSV."""

import csv
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

import cv2
import numpy as np

from ..engine.weight_io import write_atomically
from ..errors import ConfigError, DataError
from .results import Result
from .targets import PICTURES, Names, identity_of, mark_of, video_path
from .videos import video_info

KINDS = ("pictures", "video", "coco", "csv")
_CODECS = {".mp4": "mp4v", ".webm": "VP80"}
_COLUMNS = ("image", "frame", "class", "label", "score", "x1", "y1", "x2", "y2")


class Writer(Protocol):
    """Receives every result, then `close`, which returns what was written."""

    def write(self, result: Result) -> None:
        """Write one result."""

    def close(self) -> list[Path]:
        """Finish the files; called after errors, too, so that nothing done is lost.

        Without any result nothing is written: files of an earlier job stay.
        """


def check_kinds(kinds: Sequence[str], annotations: Path | None = None) -> None:
    """Raise a `ConfigError` for a kind that is none of `KINDS`, or annotations without COCO."""
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise ConfigError(f"--save names {unknown[0]!r}; write some of {', '.join(KINDS)}.")
    if annotations and "coco" not in kinds:
        raise ConfigError(
            f"--annotations {annotations} needs --save coco, but --save is {','.join(kinds)!r}; "
            "add coco, or leave out --annotations."
        )


def build_writers(
    kinds: Sequence[str], folder: Path, classes: Sequence[str], annotations: Path | None = None
) -> list[Writer]:
    """Build the writers of ``--save``.

    Args:
        kinds: of `KINDS`.
        folder: to write to.
        classes: class names of the model.
        annotations: COCO json whose ids of images and categories the COCO results get.

    Raises:
        ConfigError: for another kind, or annotations that have no use or would be replaced.
        DataError: if the annotations cannot be used.
    """
    check_kinds(kinds, annotations)
    builders: dict[str, Callable[[], Writer]] = {
        "pictures": lambda: PictureWriter(folder / PICTURES, with_videos="video" not in kinds),
        "video": lambda: VideoWriter(folder),
        "coco": lambda: (
            ResultsWriter(folder, classes, annotations)
            if annotations
            else CocoWriter(folder, classes)
        ),
        "csv": lambda: CsvWriter(folder / "detections.csv"),
    }
    return [builders[kind]() for kind in dict.fromkeys(kinds)]


class PictureWriter:
    """Draws every image into a JPEG; frames of videos get the number of the frame."""

    def __init__(self, folder: Path, *, with_videos: bool = True) -> None:
        self.folder, self.with_videos = folder, with_videos
        self._names, self._count = Names(), 0

    def write(self, result: Result) -> None:
        """Draw one result."""
        if result.frame is not None and not self.with_videos:
            return
        name = self._names(_source(result))
        if result.frame is not None:
            frame = f"{name}_{result.frame:06d}"
            name = self._names.unique(frame, (_source(result), result.frame))
        if not self._count:
            self.folder.mkdir(parents=True, exist_ok=True)
            mark_of(self.folder).touch()
        result.save(self.folder / f"{name}.jpg")
        self._count += 1

    def close(self) -> list[Path]:
        """Return the folder."""
        return [self.folder] if self._count else []


def _source(result: Result) -> str | None:
    """Path of the image or video, a name for a camera; None for an image in memory."""
    return result.path if result.path or result.frame is None else "camera"


_LIVE_FPS = 25.0


class VideoWriter:
    """Draws the frames of every video, and of every connection to a camera, into an MP4 file.

    A camera gives frames when the model is ready for one, so its frames are repeated until the
    next, and the file plays as fast as things happened.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._names, self._files = Names(), list[Path]()
        self._source: str | None = None
        self._frame = -1
        self._video: cv2.VideoWriter | None = None
        self._picture: np.ndarray | None = None  # of a camera, the last one
        self._count = 0  # of frames in the file

    def write(self, result: Result) -> None:
        """Draw one frame; the first of another video begins another file."""
        if result.frame is None:
            return
        source, is_live = result.path or "camera", result.seconds is not None
        is_again = is_live and result.frame <= self._frame  # connected again, or another camera
        if source != self._source or is_again:
            self._source = source
            self._open(source, result)
        self._frame = result.frame
        if self._video is None:  # the first frame reported the fault of a file
            return
        if result.seconds is None:
            write_frame(self._video, result)
            return
        self._repeat(round(result.seconds * _LIVE_FPS))
        self._picture = _drawn(result)

    def _repeat(self, count: int) -> None:
        """Write the last picture of a camera until the file has that many frames."""
        assert self._video is not None
        while self._picture is not None and self._count < count:
            self._video.write(self._picture)
            self._count += 1

    def _open(self, source: str, result: Result) -> None:
        self._release()
        name = self._names(source)
        if result.seconds is not None:  # a file for each connection
            name = self._names.unique(name, (source, len(self._files)))
        path = video_path(self.folder, name)
        fps = video_info(source).fps if result.seconds is None else _LIVE_FPS
        height, width = result.size
        self._video = open_video(path, fps, (width, height))
        self._files.append(path)

    def _release(self) -> None:
        if self._video is not None:
            self._repeat(self._count + 1)  # the last picture
            self._video.release()
        self._video, self._picture, self._count = None, None, 0

    def close(self) -> list[Path]:
        """Finish the last video."""
        self._release()
        return self._files


def open_video(path: Path, fps: float, size: tuple[int, int]) -> cv2.VideoWriter:
    """Open a video to write.

    Args:
        path: ``.mp4`` (MPEG-4), or ``.webm`` (VP8), which browsers play.
        fps: frames per second.
        size: width and height in pixels.

    Raises:
        DataError: if it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    video = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*_CODECS[path.suffix]), fps, size)
    if not video.isOpened():
        raise DataError(f"Video {path} cannot be written; check the folder and free space.")
    return video


def write_frame(video: cv2.VideoWriter, result: Result) -> None:
    """Draw a result into a video."""
    video.write(_drawn(result))


def _drawn(result: Result) -> np.ndarray:
    """Draw a result as OpenCV writes it, (H, W, 3) BGR."""
    return np.ascontiguousarray(np.asarray(result.plot())[..., ::-1])


class CocoWriter:
    """Writes a COCO dataset of the images and detections, which annotation tools can import."""

    def __init__(self, folder: Path, classes: Sequence[str]) -> None:
        self.path = folder / "detections.json"
        self._classes = classes
        self._images: list[dict[str, Any]] = []
        self._annotations: list[dict[str, Any]] = []

    def write(self, result: Result) -> None:
        """Add one image."""
        image_id = len(self._images) + 1
        height, width = result.size
        name = result.path or f"image {image_id}"
        image = {"id": image_id, "file_name": name, "height": height, "width": width}
        if result.frame is not None:
            image["frame"] = result.frame
        self._images.append(image)
        for entry in result.to_coco(image_id):
            area = round(entry["bbox"][2] * entry["bbox"][3], 3)
            number = len(self._annotations) + 1
            self._annotations.append({"id": number, **entry, "area": area, "iscrowd": 0})

    def close(self) -> list[Path]:
        """Write the file, if there was an image."""
        if not self._images:
            return []
        categories = [{"id": i, "name": name} for i, name in enumerate(self._classes, start=1)]
        content = {
            "images": self._images, "categories": categories, "annotations": self._annotations,
        }  # fmt: skip
        _write_json(self.path, content)
        return [self.path]


class ResultsWriter:
    """Writes COCO results with the ids of an annotation file, as evaluation tools expect them."""

    def __init__(self, folder: Path, classes: Sequence[str], annotations: Path) -> None:
        """Read the ids.

        Raises:
            ConfigError: if the results would replace the file.
            DataError: if the file is no COCO json, or lacks a class of the model.
        """
        self.path = folder / "results.json"
        if (identity := identity_of(annotations)) and identity == identity_of(self.path):
            raise ConfigError(
                f"--annotations is {str(annotations)!r}, which the results would replace. Write "
                "another --output."
            )
        try:
            content = json.loads(annotations.read_bytes())  # finds out the encoding
            images = {str(x["file_name"]): x["id"] for x in content["images"]}
            categories = {str(x["name"]): x["id"] for x in content["categories"]}
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            raise DataError(
                f"--annotations {annotations} cannot be used ({error!r}); write a COCO json."
            ) from error
        missing = [name for name in classes if name not in categories]
        if missing:
            raise DataError(
                f"--annotations {annotations} has no category {missing[0]!r}, a class of the "
                "model. Write the file whose classes the model was trained with."
            )
        self._images: dict[str, list[tuple[tuple[str, ...], Any]]] = {}  # by the last part
        for name, number in images.items():
            for spelled in dict.fromkeys((name, name.replace("\\", "/"))):  # as on Windows
                parts = Path(os.path.normpath(spelled)).parts or ("",)
                self._images.setdefault(parts[-1], []).append((parts, number))
        self._ids = [categories[name] for name in classes]
        self._results: list[dict[str, Any]] = []
        self._paths: dict[Any, str] = {}  # written images by id

    def write(self, result: Result) -> None:
        """Add one image.

        Raises:
            DataError: if it is not in the annotations, several of them may be meant, or the one
                that is meant is written already.
        """
        path = os.path.abspath(result.path) if result.path else ""
        image_id = self._id_of(path)
        if image_id in self._paths:
            raise DataError(
                f"Image {path!r} has the id {image_id!r} in --annotations, but so has "
                f"{self._paths[image_id]!r}. Predict each image once, in the folders of "
                "--annotations."
            )
        self._results += result.to_coco(image_id, self._ids)
        self._paths[image_id] = path

    def _id_of(self, path: str) -> Any:
        """Id of the entry whose name ends the path, or else of the only one it may be.

        That is one with the same last part and folder: whole data may have been moved.
        """
        parts = Path(path).parts
        named = self._images.get(parts[-1] if parts else "", [])
        exact = [(len(p), number) for p, number in named if parts[-len(p) :] == p]
        if exact:
            return max(exact, key=lambda pair: pair[0])[1]
        known = [number for p, number in named if p[-2:] == parts[-2:]]
        if len(known) != 1:
            fault = f"{len(known)} images of that name are" if known else "is not"
            raise DataError(
                f"Image {path!r}: {fault} in --annotations. Predict its images, in its folders."
            )
        return known[0]

    def close(self) -> list[Path]:
        """Write the file, if there was an image."""
        if not self._paths:
            return []
        _write_json(self.path, self._results)
        return [self.path]


class CsvWriter:
    """Writes a row for every detection, at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[str] | None = None

    def write(self, result: Result) -> None:
        """Add the rows of an image."""
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open(
                "w", newline="", encoding="utf-8", errors="surrogateescape"
            )  # names of files may be of another encoding: their bytes are written as they are
            csv.writer(self._file).writerow(_COLUMNS)
        rows = csv.writer(self._file)
        for entry in result.to_dict():
            box = [f"{entry[key]:.2f}" for key in ("x1", "y1", "x2", "y2")]
            number = "" if result.frame is None else result.frame
            known = [result.path or "", number, entry["name"], entry["label"]]
            rows.writerow([*known, f"{entry['score']:.4f}", *box])
        self._file.flush()

    def close(self) -> list[Path]:
        """Close the file."""
        if self._file is None:
            return []
        self._file.close()
        return [self.path]


def _write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(json.dumps(content).encode()))
