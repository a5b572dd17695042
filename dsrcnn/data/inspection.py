"""A look at a data set before it is trained on: what is broken, doubtful, or good to know."""

import hashlib
import io
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from detectron2.structures import BoxMode
from PIL import Image

from .annotations import box_fault, turned_size

__all__ = ["FAULTS", "NOTES", "SIZES", "SplitReport", "compare_splits", "inspect_records"]

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
