"""What makes a box annotation usable, and the size of the image it is in."""

import hashlib
import io
import logging
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from detectron2.structures import BoxMode
from PIL import Image

from ...errors import DataError

__all__ = [
    "FAULTS",
    "NOTES",
    "SIZES",
    "Fail",
    "SplitReport",
    "box_fault",
    "check_records",
    "compare_splits",
    "inspect_records",
    "read_lines",
    "refuse",
    "shown_size",
    "turned_size",
]

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


_LOGGER = logging.getLogger(__name__)
_WARNED: set[str] = set()
_SHOWN = 5  # examples named in a message


def check_records(records: list[dict], source: str, image_root: str) -> None:
    """Refuse records that cannot be used, and take unusable boxes out of the others, in place.

    Boxes that are not finite, have no area or lie wholly outside their image are left out with one
    warning that counts and names them; boxes that reach over the border are clipped when an image
    is loaded.

    Args:
        records: in Detectron2's format.
        source: file or folder they were read from, for messages.
        image_root: folder of the images, for messages.

    Raises:
        DataError: if there are no images or boxes, or images that do not exist.
    """
    if not records:
        raise DataError(f"The data set is empty: {source} lists no images.")
    _check_images(records, source, image_root)
    _drop_unusable_boxes(records, source)
    if not any(record["annotations"] for record in records):
        raise DataError(
            f"{source} has {len(records)} images but no box that can be used; check the "
            "annotations."
        )


def _check_images(records: list[dict], source: str, image_root: str) -> None:
    missing = [r["file_name"] for r in records if not Path(r["file_name"]).is_file()]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(records)} images of {source} do not exist: "
            f"{_some(missing, ', ')}. File names are relative to {image_root!r}; correct the image "
            "folder or the file."
        )


def _drop_unusable_boxes(records: list[dict], source: str) -> None:
    faults: list[str] = []
    for record in records:
        usable = []
        for annotation in record["annotations"]:
            fault = box_fault(annotation, record.get("height"), record.get("width"))
            if fault is None:
                usable.append(annotation)
            else:
                faults.append(f"{Path(record['file_name']).name} {annotation['bbox']} ({fault})")
        record["annotations"] = usable
    if faults:
        message = (
            f"{source}: {len(faults)} boxes cannot be used and are left out, the images stay: "
            f"{_some(faults, '; ')}. Correct or remove them in the file to silence this warning."
        )
        if message not in _WARNED:  # loaders are built for every evaluation; once is enough
            _WARNED.add(message)
            _LOGGER.warning(message)


def _some(items: list[str], separator: str) -> str:
    return separator.join(items[:_SHOWN]) + (f"{separator}..." if len(items) > _SHOWN else "")


# Told the kind and what is wrong; a reader goes on after it. Kinds: "image" (missing), "broken"
# (image), "annotation", "class" and "id".
Fail = Callable[[str, str], None]


def refuse(kind: str, text: str) -> NoReturn:
    """For training: the first fault ends it."""
    raise DataError(text)


def read_lines(path: Path) -> list[str]:
    """Lines of a text file.

    Raises:
        DataError: if it is no text in UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text in UTF-8 ({error}); save it again.") from error


# Faults end a training or spoil its result; of the rest one should know.
FAULTS = (
    *("image missing", "image broken", "image size differs", "image twice", "image in two splits"),
    *("annotation broken", "id twice", "unknown class", "classes differ"),
    *("box not finite", "box without area", "box outside"),
)
NOTES = ("image without boxes", "box over the border", "box tiny", "crowd")
SIZES = (16, 32, 64, 128, 256)  # limits of the histogram, pixels at the training size

_TINY = 4.0  # pixels at the training size; less than one cell of the finest level
_BY_FAULT = {
    "not finite": "box not finite",
    "no area": "box without area",
    "outside the image": "box outside",
}
_BY_KIND = {
    "annotation": "annotation broken",
    "class": "unknown class",
    "id": "id twice",
    "image": "image missing",
    "broken": "image broken",
}


@dataclass
class SplitReport:
    """What was found in a split.

    Attributes:
        name: of the split.
        classes: class names.
        images: how many.
        found: examples in words, by what they are of `FAULTS` and `NOTES`.
        boxes: usable boxes by class.
        sizes: usable boxes by the place of their square root of area among `SIZES`.
        contents: file names by a hash of their content.
    """

    name: str
    classes: Sequence[str]
    images: int = 0
    found: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    boxes: Counter[int] = field(default_factory=Counter)
    sizes: Counter[int] = field(default_factory=Counter)
    contents: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    @property
    def has_faults(self) -> bool:
        """Whether something should be mended."""
        return any(self.found.get(kind) for kind in FAULTS)


def inspect_records(
    name: str,
    classes: Sequence[str],
    records: Sequence[dict[str, Any]],
    unread: Iterable[tuple[str, str]] = (),
    *,
    min_size: int = 800,
    max_size: int = 1333,
) -> SplitReport:
    """Look at every image and box of a split.

    Images are decoded as a whole: a file may end too early behind a proper header.

    Args:
        name: of the split.
        classes: class names.
        records: in Detectron2's format, not checked yet.
        unread: kind and text of what the reader could not use.
        min_size: shorter side that images are resized to for training.
        max_size: limit of the longer side.
    """
    report = SplitReport(name, classes, images=len(records))
    for kind, text in unread:
        report.found[_BY_KIND[kind]].append(text)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding does not hold the interpreter
        opened = pool.map(_open, [record["file_name"] for record in records])
        for record, (content, size, error) in zip(records, opened, strict=True):
            where = Path(record["file_name"]).name
            recorded = (record["width"], record["height"])
            if error and recorded != (0, 0):  # else the reader has said it
                report.found[error].append(f"{record['file_name']}")
            if content:
                report.contents[content].append(where)
            if size and recorded != (0, 0) and size != recorded:
                text = f"{where}: {size[0]}x{size[1]}, recorded {recorded[0]}x{recorded[1]}"
                report.found["image size differs"].append(text)
            scale = _training_scale(recorded, min_size, max_size)
            for annotation in record["annotations"]:
                _inspect_box(report, where, annotation, recorded, scale)
            if not record["annotations"]:
                report.found["image without boxes"].append(where)
    for names in report.contents.values():
        if len(names) > 1:
            report.found["image twice"].append(" = ".join(names))
    return report


def compare_splits(reports: Sequence[SplitReport]) -> None:
    """Find images that several splits hold, by content, and splits of other classes than the first.

    What is tested must not be trained on.
    """
    for index, report in enumerate(reports):
        first = reports[0]
        if list(report.classes) != list(first.classes):
            text = f"{', '.join(report.classes)}; {first.name} has {', '.join(first.classes)}"
            report.found["classes differ"].append(text)
        for other in reports[:index]:
            for content in report.contents.keys() & other.contents.keys():
                mine, theirs = report.contents[content][0], other.contents[content][0]
                text = f"{mine} is {theirs} of {other.name}"
                report.found["image in two splits"].append(text)


def _open(path: str) -> tuple[str | None, tuple[int, int] | None, str | None]:
    """Hash of the content, size (w, h), and what is wrong."""
    try:
        data = Path(path).read_bytes()
    except OSError:
        return None, None, "image missing"
    content = hashlib.sha1(data, usedforsecurity=False).hexdigest()
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return content, turned_size(image), None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return content, None, "image broken"


def _training_scale(size: tuple[int, int], min_size: int, max_size: int) -> float:
    return min(min_size / max(min(size), 1), max_size / max(*size, 1))


def _inspect_box(
    report: SplitReport,
    where: str,
    annotation: dict[str, Any],
    size: tuple[int, int],
    scale: float,
) -> None:
    width, height = size
    text = f"{where}: {annotation['bbox']}"
    fault = box_fault(annotation, height, width)
    if fault:
        report.found[_BY_FAULT.get(fault, "annotation broken")].append(text)
        return
    if annotation.get("iscrowd", 0):
        report.found["crowd"].append(text)
        return
    box = [float(v) for v in annotation["bbox"]]
    x1, y1, x2, y2 = BoxMode.convert(box, annotation["bbox_mode"], BoxMode.XYXY_ABS)
    # Half a pixel over the border is rounding.
    if min(x1, y1) < -0.5 or x2 > width + 0.5 or y2 > height + 0.5:
        report.found["box over the border"].append(text)
    w, h = (x2 - x1) * scale, (y2 - y1) * scale
    if min(w, h) < _TINY:
        report.found["box tiny"].append(f"{text}, {w:.1f} x {h:.1f} when trained on")
    report.boxes[annotation["category_id"]] += 1
    report.sizes[sum((w * h) ** 0.5 >= limit for limit in SIZES)] += 1
