"""Checks of boxes and records before training, and the inspection of a whole dataset."""

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
from typing import IO, Any, NoReturn

from detectron2.structures import BoxMode
from PIL import Image

from ...errors import DataError

# Faults stop a training or spoil its result; notes are worth knowing.
FAULTS = (
    *("image missing", "image broken", "image size differs"),
    *("duplicate image", "image in two splits"),
    *("annotation broken", "duplicate id", "unknown class", "classes differ"),
    *("box not finite", "box without area", "box outside"),
)
NOTES = ("image without boxes", "box over the border", "tiny box", "crowd")
SIZES = (16, 32, 64, 128, 256)  # limits of the histogram, in pixels at the training size

_BOX_FAULTS = {  # of `box_fault`
    "not finite": "box not finite",
    "no area": "box without area",
    "outside the image": "box outside",
}
_TINY = 4.0  # pixels at the training size; less than one cell of the finest level
_MAX_EXAMPLES = 5  # per message
_EXIF_ORIENTATION = 0x0112
_LOGGER = logging.getLogger(__name__)
_WARNED: set[str] = set()

# Called by the readers with one of `FAULTS` and a message; reading continues if it returns.
OnError = Callable[[str, str], None]


def raise_error(fault: str, message: str) -> NoReturn:
    """Raise a `DataError`: the `OnError` for training."""
    raise DataError(message)


def read_lines(path: Path) -> list[str]:
    """Read the lines of a UTF-8 text file.

    Raises:
        DataError: if it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text in UTF-8 ({error}); save it again.") from error


def image_file_size(file: Path | IO[bytes], *, decode: bool = False) -> tuple[int, int]:
    """Read width and height of an image after rotation by its EXIF orientation."""
    with Image.open(file) as image:
        if decode:
            image.load()
        width, height = image.size
        is_transposed = image.getexif().get(_EXIF_ORIENTATION) in (5, 6, 7, 8)
    return (height, width) if is_transposed else (width, height)


def make_annotation(box: Sequence[float], label: int, *, is_crowd: bool = False) -> dict[str, Any]:
    """Return an annotation in Detectron2's format; `box` is x, y, width and height in pixels."""
    annotation = {"bbox": box, "bbox_mode": BoxMode.XYWH_ABS}
    return {**annotation, "category_id": label, "iscrowd": int(is_crowd)}


def box_fault(annotation: dict, height: int | None = None, width: int | None = None) -> str | None:
    """Explain why the box of an annotation is unusable; None if it is usable.

    Height and width of the image are in pixels, None if unknown.
    """
    box = annotation["bbox"]
    if len(box) != 4:
        return f"{len(box)} numbers instead of 4"
    values = [v.item() if hasattr(v, "item") else v for v in box]  # numpy scalars
    if not all(isinstance(v, (int, float)) and math.isfinite(v) for v in values):
        return "not finite"
    x1, y1, x2, y2 = to_xyxy(annotation)
    if x2 <= x1 or y2 <= y1:
        return "no area"
    if x2 <= 0 or y2 <= 0 or (width and x1 >= width) or (height and y1 >= height):
        return "outside the image"
    return None


def to_xyxy(annotation: dict) -> list[float]:
    """Return the box of an annotation as xyxy floats in pixels."""
    box = [float(v) for v in annotation["bbox"]]
    return BoxMode.convert(box, annotation["bbox_mode"], BoxMode.XYXY_ABS)


def check_records(records: list[dict], source: str, image_root: str) -> None:
    """Reject unusable records, and remove unusable boxes from the rest in place.

    Boxes that are not finite, have no area or lie outside their image are removed, with one
    warning that counts and names them. Boxes over the border are clipped when an image is loaded.
    The messages name `source`, the file or folder of the annotations, and the folder `image_root`.

    Raises:
        DataError: if there are no images, no usable boxes, or images that do not exist.
    """
    if not records:
        raise DataError(f"The dataset is empty: {source} lists no images.")
    missing = [r["file_name"] for r in records if not Path(r["file_name"]).is_file()]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(records)} images of {source} do not exist: "
            f"{_examples(missing, ', ')}. File names are relative to {image_root!r}; correct the "
            "image folder or the file."
        )
    _remove_unusable_boxes(records, source)
    if not any(record["annotations"] for record in records):
        fault = f"{source} has {len(records)} images but no box that can be used"
        raise DataError(f"{fault}; check the annotations.")


def _remove_unusable_boxes(records: list[dict], source: str) -> None:
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
            f"{_examples(faults, '; ')}. Correct or remove them in the file to silence this "
            "warning."
        )
        if message not in _WARNED:  # a loader is built for every evaluation
            _WARNED.add(message)
            _LOGGER.warning(message)


def _examples(items: list[str], separator: str) -> str:
    ellipsis = f"{separator}..." if len(items) > _MAX_EXAMPLES else ""
    return separator.join(items[:_MAX_EXAMPLES]) + ellipsis


@dataclass
class SplitReport:
    """Statistics and issues of a split.

    Attributes:
        issues: a description of each case, by entries of `FAULTS` and `NOTES`.
        boxes: number of usable boxes by label.
        sizes: number of usable boxes by the bin of their square root of area among `SIZES`.
        hashes: file names by the hash of their content.
    """

    name: str
    classes: Sequence[str]
    images: int = 0  # number of images
    issues: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    boxes: Counter[int] = field(default_factory=Counter)
    sizes: Counter[int] = field(default_factory=Counter)
    hashes: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    @property
    def has_faults(self) -> bool:
        """Whether anything should be fixed."""
        return any(self.issues.get(fault) for fault in FAULTS)


def inspect_records(
    name: str,
    classes: Sequence[str],
    records: Sequence[dict[str, Any]],
    errors: Iterable[tuple[str, str]],
    *,
    min_size: int,
    max_size: int,
) -> SplitReport:
    """Inspect every image and box of a split.

    Images are decoded completely, since a truncated file has a valid header.

    Args:
        name: of the split.
        classes: class names.
        records: Detectron2's format, unchecked.
        errors: faults and messages from reading the records.
        min_size: shorter side of training images in pixels.
        max_size: limit of the longer side.
    """
    report = SplitReport(name, classes, images=len(records))
    for reported, message in errors:
        report.issues[reported].append(message)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding releases the GIL
        images = pool.map(_decode, [record["file_name"] for record in records])
        for record, (digest, size, fault) in zip(records, images, strict=True):
            file_name = Path(record["file_name"]).name
            recorded = (record["width"], record["height"])
            was_read = recorded != (0, 0)  # else the reader has reported the image
            if fault and was_read:
                report.issues[fault].append(record["file_name"])
            if digest:
                report.hashes[digest].append(file_name)
            if size and was_read and size != recorded:
                text = f"{file_name}: {size[0]}x{size[1]}, recorded {recorded[0]}x{recorded[1]}"
                report.issues["image size differs"].append(text)
            scale = min(min_size / max(min(recorded), 1), max_size / max(*recorded, 1))
            for annotation in record["annotations"]:
                _inspect_box(report, file_name, annotation, recorded, scale)
            if not record["annotations"]:
                report.issues["image without boxes"].append(file_name)
    for names in report.hashes.values():
        if len(names) > 1:
            report.issues["duplicate image"].append(" = ".join(names))
    return report


def _decode(path: str) -> tuple[str | None, tuple[int, int] | None, str | None]:
    """Return hash of the content, size (w, h) and fault of an image file."""
    try:
        content = Path(path).read_bytes()
    except OSError:
        return None, None, "image missing"
    digest = hashlib.sha1(content, usedforsecurity=False).hexdigest()
    try:
        return digest, image_file_size(io.BytesIO(content), decode=True), None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return digest, None, "image broken"


def _inspect_box(
    report: SplitReport, file_name: str, annotation: dict, size: tuple[int, int], scale: float
) -> None:
    width, height = size
    text = f"{file_name}: {annotation['bbox']}"
    if fault := box_fault(annotation, height, width):
        report.issues[_BOX_FAULTS.get(fault, "annotation broken")].append(text)
        return
    if annotation.get("iscrowd", 0):
        report.issues["crowd"].append(text)
        return
    x1, y1, x2, y2 = to_xyxy(annotation)
    if min(x1, y1) < -0.5 or x2 > width + 0.5 or y2 > height + 0.5:  # less is rounding
        report.issues["box over the border"].append(text)
    w, h = (x2 - x1) * scale, (y2 - y1) * scale
    if min(w, h) < _TINY:
        report.issues["tiny box"].append(f"{text}, {w:.1f} x {h:.1f} at the training size")
    report.boxes[annotation["category_id"]] += 1
    report.sizes[sum((w * h) ** 0.5 >= limit for limit in SIZES)] += 1


def compare_splits(reports: Sequence[SplitReport]) -> None:
    """Add images that are in several splits, by content, and differing classes to the reports."""
    for index, report in enumerate(reports):
        first = reports[0]
        if list(report.classes) != list(first.classes):
            text = f"{', '.join(report.classes)}; {first.name} has {', '.join(first.classes)}"
            report.issues["classes differ"].append(text)
        for other in reports[:index]:
            for digest in report.hashes.keys() & other.hashes.keys():
                text = f"{report.hashes[digest][0]} is {other.hashes[digest][0]} of {other.name}"
                report.issues["image in two splits"].append(text)
