"""Inspection of a whole dataset: faults, notes and statistics, for ``dsrcnn check-data``."""

import hashlib
import io
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import DataError
from ..files import file_fault, read_bytes
from ..images import image_file_size
from .validate import box_fault, has_mask, is_learnable, to_xyxy

# Faults stop a training or spoil its result; notes are worth knowing.
FAULTS = (
    *("image missing", "image broken", "image size differs"),
    *("duplicate image", "image in two splits"),
    *("annotation broken", "duplicate id", "unknown class", "classes differ", "nothing to learn"),
    *("box not finite", "box without area", "box outside"),
)
NOTES = (
    *("image without boxes", "label without image"),
    *("box over the border", "tiny box", "crowd"),
)
SIZES = (16, 32, 64, 128, 256)  # limits of the histogram, in pixels at the training size

_BOX_FAULTS = {  # of `box_fault`
    "not finite": "box not finite",
    "no area": "box without area",
    "outside the image": "box outside",
}
_TINY = 4.0  # pixels at the training size; less than one cell of the finest level


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
    min_size: float,
    max_size: float,
    for_training: bool = True,
    needs_masks: bool = False,
) -> SplitReport:
    """Inspect every image and box of a split.

    Images are decoded completely, since a truncated file has a valid header.

    Args:
        name: of the split.
        classes: class names.
        records: Detectron2's format, unchecked.
        errors: faults and messages from reading the records.
        min_size: shorter side of training images in pixels; 0 leaves their size alone.
        max_size: limit of the longer side.
        for_training: whether the split needs objects to learn.
        needs_masks: whether objects need masks, too.
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
            scale = scale if min_size else 1.0
            for annotation in record["annotations"]:
                _inspect_box(report, file_name, annotation, recorded, scale)
                if needs_masks and is_learnable(annotation) and not has_mask(annotation):
                    text = f"{file_name}: {annotation['bbox']} without usable segmentation"
                    report.issues["annotation broken"].append(text)
            if not record["annotations"]:
                report.issues["image without boxes"].append(file_name)
    if not records or (for_training and not report.boxes):
        text = "no box that is no crowd" if records else "no images"
        report.issues["nothing to learn"].append(text)
    for names in report.hashes.values():
        if len(names) > 1:
            report.issues["duplicate image"].append(" = ".join(names))
    return report


def _decode(path: str) -> tuple[str | None, tuple[int, int] | None, str | None]:
    """Return hash of the content, size (w, h) and fault of an image file."""
    if file_fault(path) == "does not exist":
        return None, None, "image missing"
    try:
        content = read_bytes(path)
    except DataError:
        return None, None, "image broken"
    digest = hashlib.sha1(content, usedforsecurity=False).hexdigest()
    try:
        return digest, image_file_size(io.BytesIO(content), decode=True), None
    except ValueError:
        return digest, None, "image broken"


def _inspect_box(
    report: SplitReport, file_name: str, annotation: dict, size: tuple[int, int], scale: float
) -> None:
    width, height = size
    text = f"{file_name}: {annotation['bbox']}"
    if fault := box_fault(annotation, height, width):
        report.issues[_BOX_FAULTS.get(fault, "annotation broken")].append(text)
        return
    if not is_learnable(annotation):
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
