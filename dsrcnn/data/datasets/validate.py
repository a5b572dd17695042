"""Checks of boxes and records before training and evaluation."""

import logging
import math
import numbers
import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np
from detectron2.structures import BoxMode

from ...errors import DataError
from ..files import is_file
from .fields import as_id, as_side, show

_MAX_EXAMPLES = 5  # per message
_MAX_COORDINATE = 1e8  # pixels; float32 cannot tell neighboring pixels apart beyond
_MIN_SIDE = 1e-3  # pixels; float32 loses less in an image of several thousand pixels
_ABSOLUTE = (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
_LOGGER = logging.getLogger(__name__)
_WARNED: set[str] = set()

# Called by the readers with an entry of `inspection.FAULTS` and a message; reading continues if it
# returns.
OnError = Callable[[str, str], None]


def raise_error(fault: str, message: str) -> NoReturn:
    """Raise a `DataError`: the `OnError` for training."""
    raise DataError(message)


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
    try:
        x1, y1, x2, y2 = to_xyxy(annotation)
    except (TypeError, ValueError, OverflowError):
        return "not finite"
    # Comparisons with NaN are false.
    if not (max(x1, y1, x2, y2) <= _MAX_COORDINATE and min(x1, y1, x2, y2) >= -_MAX_COORDINATE):
        return "not finite"
    if x2 - x1 < _MIN_SIDE or y2 - y1 < _MIN_SIDE:
        return "no area"
    if x2 <= 0 or y2 <= 0 or (width and x1 >= width) or (height and y1 >= height):
        return "outside the image"
    return None


def to_xyxy(annotation: dict) -> list[float]:
    """Return the box of an annotation as xyxy floats in pixels."""
    x, y, right, bottom = map(float, annotation["bbox"])
    if annotation["bbox_mode"] == BoxMode.XYWH_ABS:
        return [x, y, x + right, y + bottom]
    return BoxMode.convert([x, y, right, bottom], annotation["bbox_mode"], BoxMode.XYXY_ABS)


def is_learnable(annotation: dict) -> bool:
    """Whether an annotation with a usable box is an object to learn: no crowd."""
    return annotation.get("iscrowd", 0) == 0


def has_mask(annotation: dict) -> bool:
    """Whether an annotation has polygons of at least three finite points, or a mask."""
    mask = annotation.get("segmentation")
    if not isinstance(mask, list):
        return isinstance(mask, dict) and {"counts", "size"} <= mask.keys()
    try:
        points = [np.asarray(polygon, dtype=float) for polygon in mask]
    except (TypeError, ValueError):
        return False
    valid = [
        p.ndim == 1 and p.size >= 6 and p.size % 2 == 0 and np.isfinite(p).all() for p in points
    ]
    return bool(valid) and all(valid)


def check_records(
    records: list[dict], source: str, image_root: str, *, labeled: bool = True
) -> None:
    """Reject unusable records, and remove unusable boxes from the rest in place.

    Boxes that are not finite, have no area or lie outside their image are removed, with one
    warning that counts and names them. Boxes over the border are clipped when an image is loaded.
    The messages name `source`, the file or folder of the annotations, and the folder `image_root`.

    Raises:
        DataError: if there are no images, images that do not exist, or, with `labeled`, no objects
            to learn.
    """
    if not records:
        raise DataError(f"The dataset is empty: {source} lists no images.")
    advice = f"File names are relative to {image_root!r}; correct the image folder or the file."
    _check_images_exist(records, source, advice)
    _warn_of_repetition(records, source)
    _remove_unusable_boxes(records, source)
    if labeled:
        check_learnable(records, source)


def _check_images_exist(records: Sequence[dict], source: str, advice: str) -> None:
    names = [str(record["file_name"]) for record in records]
    missing = [name for name in names if "://" not in name and not is_file(name)]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(names)} images of {source} do not exist: "
            f"{_examples(missing, ', ')}. {advice}"
        )


def _warn_of_repetition(records: Sequence[dict], source: str) -> None:
    counts = Counter(os.path.normpath(record["file_name"]) for record in records)
    if len(counts) < len(records):
        repeated = [f"{name} {count} times" for name, count in counts.items() if count > 1]
        what = f"{len(repeated)} images are listed more than once (duplicate image)"
        warn_once(source, what, repeated)


def check_learnable(records: Sequence[dict], source: str) -> None:
    """Raise a `DataError` if no record has a usable box that is no crowd."""
    for record in records:
        size = record.get("height"), record.get("width")
        for annotation in record["annotations"]:
            if is_learnable(annotation) and box_fault(annotation, *size) is None:
                return
    crowds = sum(not is_learnable(a) for r in records for a in r["annotations"])
    text = f" ({crowds} are crowds or ignored)" if crowds else ""
    raise DataError(
        f"{source} has {len(records)} images but no box that can be used{text}; check the "
        "annotations."
    )


def _remove_unusable_boxes(records: list[dict], source: str) -> None:
    faults: list[str] = []
    for record in records:
        height, width = record.get("height"), record.get("width")
        reasons = [box_fault(a, height, width) for a in record["annotations"]]
        if any(reasons):
            pairs = list(zip(record["annotations"], reasons, strict=True))
            name = os.path.basename(record["file_name"])
            faults += [f"{name} {a['bbox']} ({fault})" for a, fault in pairs if fault]
            record["annotations"] = [a for a, fault in pairs if fault is None]
    if faults:
        what = f"{len(faults)} boxes cannot be used and are left out, the images stay"
        warn_once(source, what, faults)


def warn_once(source: str, what: str, cases: list[str]) -> None:
    """Warn of something in the annotations, with examples, once per process."""
    message = (
        f"{source}: {what}: {_examples(cases, '; ')}. Correct or remove them to silence this "
        "warning."
    )
    if message not in _WARNED:  # a loader is built for every evaluation
        _WARNED.add(message)
        _LOGGER.warning(message)


def _examples(items: list[str], separator: str) -> str:
    ellipsis = f"{separator}..." if len(items) > _MAX_EXAMPLES else ""
    return separator.join(items[:_MAX_EXAMPLES]) + ellipsis


def check_custom_records(
    records: Any, name: str, num_classes: int | None, *, for_training: bool, find_images: bool
) -> list[dict[str, Any]]:
    """Check what the function of a registered dataset returns, as files are checked.

    Args:
        records: what it returned.
        name: of the dataset.
        num_classes: number of class names in its metadata, None without.
        for_training: whether annotations are needed; else ``image_id`` is.
        find_images: whether the image files must exist.

    Returns:
        Copies of the records, without unusable boxes.

    Raises:
        DataError: naming the first record, its field, its value and what is expected.
    """
    where = f"Dataset {name!r}"
    if not isinstance(records, (list, tuple)):
        raise DataError(
            f"{where}: its function returns {type(records).__name__} {show(records)}; return a "
            "list of records in Detectron2's format."
        )
    if not records:
        raise DataError(f"Dataset {name} cannot be used: the dataset {name!r} is empty.")
    for index, record in enumerate(records):
        fault = _record_fault(record, for_training)
        if fault:
            raise DataError(f"{where}: record {index} {fault}; correct its function.")
        for number, annotation in enumerate(record.get("annotations", ())):
            if not _is_valid_annotation(annotation, num_classes):
                fault = _annotation_fault(annotation, num_classes)
                if fault:
                    text = f"{where}: record {index}, annotation {number} {fault}"
                    raise DataError(f"{text}; correct its function.")
    if not for_training:
        seen: dict[Any, int] = {}
        for index, record in enumerate(records):
            first = seen.setdefault(record["image_id"], index)
            if first != index:
                shown = show(record["image_id"])
                text = f"records {first} and {index} have the image_id {shown}"
                raise DataError(f"{where}: {text}; number them without repetition.")
    if find_images:
        _check_images_exist(records, where, "Correct its function or the image folder.")
    _warn_of_repetition(records, where)
    # Images to predict may have no labels.
    records = [{**r, "annotations": r.get("annotations", [])} for r in records]
    _remove_unusable_boxes(records, where)
    if for_training:
        check_learnable(records, where)
    return records


def _record_fault(record: Any, for_training: bool) -> str | None:
    """Explain what is wrong with a record, apart from its annotations."""
    if not isinstance(record, dict):
        return f"is {type(record).__name__} {show(record)}; expected a dictionary"
    required = ("file_name", "annotations") if for_training else ("file_name", "image_id")
    missing = [key for key in required if _is_missing(record, key)]
    if ("height" in record) != ("width" in record):
        missing.append("width" if "height" in record else "height")
    if missing:
        return f"lacks {', '.join(missing)}"
    if not isinstance(record["file_name"], (str, os.PathLike)):
        return f"has file_name {show(record['file_name'])}; expected a path as text"
    if not isinstance(record.get("annotations", []), (list, tuple)):
        return f"has annotations {show(record['annotations'])}; expected a list"
    checks = [(key, as_side) for key in ("height", "width") if key in record]
    for key, check in [*checks, *([] if for_training else [("image_id", as_id)])]:
        value = record[key]
        try:
            check(value.item() if hasattr(value, "item") else value)  # numpy scalars
        except ValueError as error:
            return f"has {key} {show(value)}; expected {error}"
    return None


def _is_valid_annotation(annotation: Any, num_classes: int | None) -> bool:
    """Whether an annotation is certainly valid; fast, since large datasets have a million."""
    try:
        x, y, right, bottom = annotation["bbox"]
        label = annotation["category_id"]
        return (
            annotation["bbox_mode"] in _ABSOLUTE
            and type(label) is int
            and 0 <= label < (num_classes or label + 1)
            and isinstance(x + y + right + bottom, (int, float))
            and annotation.get("iscrowd", 0) in (0, 1)
        )
    except Exception:  # anything may be wrong with it
        return False


def _annotation_fault(annotation: Any, num_classes: int | None) -> str | None:
    """Explain why `_is_valid_annotation` is false; None for valid numpy scalars and the like."""
    if not isinstance(annotation, dict):
        return f"is {type(annotation).__name__} {show(annotation)}; expected a dictionary"
    missing = [k for k in ("bbox", "bbox_mode", "category_id") if _is_missing(annotation, k)]
    if missing:
        return f"lacks {', '.join(missing)}"
    numbers_only = isinstance(annotation["bbox"], (Sequence, np.ndarray)) and all(
        isinstance(v, numbers.Real) for v in annotation["bbox"]
    )
    label, count = annotation["category_id"], num_classes or math.inf
    is_label = isinstance(label, numbers.Integral) and not isinstance(label, bool)
    expected = {
        "bbox": ("four numbers", numbers_only and len(annotation["bbox"]) == 4),
        "bbox_mode": ("BoxMode.XYXY_ABS or BoxMode.XYWH_ABS", annotation["bbox_mode"] in _ABSOLUTE),
        "category_id": (f"an integer from 0 to {count - 1:g}", is_label and 0 <= label < count),
        "iscrowd": ("0 or 1", annotation.get("iscrowd", 0) in (0, 1)),
    }
    for key, (text, is_valid) in expected.items():
        if not is_valid:
            return f"has {key} {show(annotation[key])}; expected {text}"
    return None


def _is_missing(entry: dict, key: str) -> bool:
    value = entry.get(key)
    return value is None or (isinstance(value, str) and not value)
