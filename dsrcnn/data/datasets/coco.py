"""COCO json files as datasets: one reader for training, evaluation and the data check."""

import gc
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import pycocotools.mask
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.structures import BoxMode

from ...errors import DataError
from ..files import is_file, read_bytes
from .fields import Converter, as_box, as_flag, as_id, as_name, as_side, check_class_names, show
from .validate import OnError, check_records, raise_error, warn_once

_LOADERS: dict[str, Callable[[], list[dict]]] = {}  # of datasets registered by this package
_FIELDS: dict[str, dict[str, Converter]] = {  # of each entry of the lists of a COCO detection file
    "images": {"id": as_id, "file_name": as_name, "height": as_side, "width": as_side},
    "annotations": {"id": as_id, "image_id": as_id, "category_id": as_id, "bbox": as_box},
    "categories": {"id": as_id, "name": as_name},
}
_FLAGS = ("iscrowd", "ignore")  # either makes an object a crowd
_MAX_AREA = 1e10  # of COCO's metrics


class CocoContent(NamedTuple):
    """Checked content of a COCO json.

    Attributes:
        images: with ``id``, ``file_name``, ``height`` and ``width``.
        annotations: with ``id``, ``image_id``, ``category_id``, ``bbox``, ``area``, ``iscrowd``
            and, where it is usable, ``segmentation``.
        categories: class names by id, in the order of labels.
        is_labeled: whether there is a list of annotations.
        parent: name of a category 0 that is left out, see `read_coco_json`.
    """

    images: list[dict[str, Any]]
    annotations: list[dict[str, Any]]
    categories: dict[int | str, str]
    is_labeled: bool
    parent: str | None = None


def register_coco_json(name: str, json_file: str, image_root: str, classes: list[str]) -> None:
    """Register a COCO json under `name`; the file is read on first use.

    Registering a name again replaces the dataset, so that a notebook cell can run twice. Entries
    ``file_name`` are relative to `image_root`; `classes` are in ascending order of category ids.

    Raises:
        DataError: if another program registered `name`.
    """
    register_loader(
        name, partial(load_checked_coco_json, json_file, image_root, name, labeled=False)
    )
    MetadataCatalog.get(name).set(
        json_file=json_file, image_root=image_root, evaluator_type="coco", thing_classes=classes
    )


def register_loader(name: str, load: Callable[[], list[dict]]) -> None:
    """Register a function that checks the records it returns, in place of an earlier one.

    Raises:
        DataError: if another program registered `name`.
    """
    if is_taken(name):
        raise DataError(
            f"Dataset {name!r} is registered already, by Detectron2 or by another program; choose "
            "another DATASETS.CUSTOM.NAME."
        )
    if name in DatasetCatalog.list():
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)  # may have been registered without metadata
    _LOADERS[name] = load
    DatasetCatalog.register(name, load)


def is_taken(name: str) -> bool:
    """Whether another program, or Detectron2, registered a dataset `name`."""
    return name in DatasetCatalog.list() and name not in _LOADERS


def is_checked(name: str) -> bool:
    """Whether the records of a dataset are checked where they are read."""
    return name in _LOADERS and DatasetCatalog[name] is _LOADERS[name]


def is_plain_coco(name: str) -> bool:
    """Whether a dataset is a COCO json that Detectron2 would read without a check."""
    load = DatasetCatalog[name]
    place = f"{getattr(load, '__module__', '')}.{getattr(load, '__qualname__', '')}"
    is_coco = place.startswith(f"{load_coco_json.__module__}.register_coco_instances.")
    return is_coco and "minival" not in str(MetadataCatalog.get(name).json_file)  # repeats ids


def read_coco_json(json_file: str | Path, on_error: OnError = raise_error) -> CocoContent:
    """Read a COCO json and convert or check every value that is used.

    A category 0 that is only the parent of the others, as in exports of Roboflow, is left out.
    Annotations of images that are not listed are left out with a warning.

    Args:
        json_file: the file.
        on_error: called for each image or annotation that cannot be used.

    Raises:
        DataError: if the file is missing, not JSON or not COCO.
    """
    content = _parse(json_file)
    with _no_garbage_collection():
        images = _read_entries(json_file, "images", content["images"], on_error)
        entries = _read_entries(json_file, "annotations", content.get("annotations", []), on_error)
    categories = _read_categories(json_file, content)
    for part, items in (("images", images), ("annotations", entries)):
        counts = Counter(item["id"] for item in items)  # Detectron2 would silently skip images
        for number in (number for number, count in counts.items() if count > 1):
            text = f"several {part} have the id {number}; number them again."
            on_error("duplicate id", f"{json_file}: {text}")
    listed = {image["id"] for image in images}
    annotations, strays = [], []
    for entry in entries:
        if entry["image_id"] not in listed:
            text = f"annotation {show(entry['id'])} belongs to image {show(entry['image_id'])}"
            strays.append(f"{text}, which is not listed")
        elif entry["category_id"] not in categories:
            number = show(entry["category_id"])
            text = f"annotation {show(entry['id'])} has category {number}, but category_id={number}"
            on_error("unknown class", f"{json_file}: {text} is not listed in categories.")
        else:
            annotations.append(entry)
    if strays and on_error is raise_error:
        warn_once(str(json_file), f"{len(strays)} annotations are left out", strays)
    for text in strays if on_error is not raise_error else ():
        on_error("annotation broken", f"{json_file}: {text}.")
    names = {c["id"]: c["name"] for c in content["categories"]}
    parent = names[0] if _has_unused_parent(content) else None
    return CocoContent(images, annotations, categories, "annotations" in content, parent)


def _parse(json_file: str | Path) -> dict[str, Any]:
    """Parse a file and check that it has the lists of COCO; ``annotations`` may be missing."""
    with _no_garbage_collection():
        return _parse_lists(json_file)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Pause the search for circles of objects, which takes half of the time of a large file."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _parse_lists(json_file: str | Path) -> dict[str, Any]:
    if not is_file(json_file) and not Path(json_file).exists():
        raise DataError(f"Annotation file {str(json_file)!r} does not exist; check the path.")
    try:
        content = json.loads(read_bytes(json_file))  # detects UTF-8, -16, -32 and byte order marks
    except RecursionError:
        raise DataError(f"{json_file} is nested too deeply to be a COCO file.") from None
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"{json_file} is not valid JSON ({error}); export it again.") from error
    lists = content if isinstance(content, dict) else {}
    missing = [k for k in _FIELDS if not isinstance(lists.get(k), list)]
    if missing == ["annotations"] and "annotations" not in lists:
        missing = []
    if missing:
        raise DataError(
            f"{json_file} lacks {', '.join(missing)}; a COCO detection file has the lists "
            f"{', '.join(_FIELDS)}."
        )
    return lists


def _read_entries(
    json_file: str | Path, part: str, entries: list[Any], on_error: OnError
) -> list[dict[str, Any]]:
    """Return the entries of a list with converted values, without those that cannot be used."""
    fields = list(_FIELDS[part].items())
    finish = _finish_annotation if part == "annotations" else None
    clean = []
    for index, entry in enumerate(entries):
        try:
            values = {key: convert(entry[key]) for key, convert in fields}
            clean.append(finish(values, entry) if finish else values)
        except (KeyError, TypeError, ValueError, OverflowError):
            text = f"{json_file}: {part}[{index}] {_entry_fault(part, entry)}"
            on_error("annotation broken", f"{text}; correct the file or export it again.")
    return clean


def _entry_fault(part: str, entry: Any) -> str:
    """Explain why an entry cannot be used."""
    if not isinstance(entry, dict):
        return f"is {show(entry)}; expected an object with {', '.join(_FIELDS[part])}"
    missing = [key for key in _FIELDS[part] if entry.get(key) in (None, "", [])]
    if missing:
        required = ", ".join(_FIELDS[part])
        return f"lacks {', '.join(missing)}; every entry of {part} needs {required}"
    flags = dict.fromkeys(_FLAGS if part == "annotations" else (), as_flag)
    for key, convert in {**_FIELDS[part], **flags}.items():
        try:
            convert(entry.get(key, 0))
        except ValueError as error:
            return f"has {key} {show(entry[key])}; expected {error}"
    return f"has numbers that are too large: {show(entry)}"


def _finish_annotation(values: dict[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
    """Add the fields that are not required."""
    values["iscrowd"] = as_flag(entry.get("iscrowd", 0))
    if "ignore" in entry and as_flag(entry["ignore"]):
        values["iscrowd"] = 1
    area = entry.get("area")
    is_number = isinstance(area, (int, float)) and 0 <= area <= _MAX_AREA
    box = values["bbox"]
    values["area"] = area if is_number else float(box[2]) * float(box[3])
    if segmentation := _usable_segmentation(entry.get("segmentation")):
        values["segmentation"] = segmentation
    return values


def _usable_segmentation(value: Any) -> Any:
    """Return polygons of at least three points, or a compressed mask; None without."""
    if isinstance(value, list):
        return [p for p in value if isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0]
    if isinstance(value, dict) and isinstance(value.get("counts"), list):
        try:
            return pycocotools.mask.frPyObjects(value, *value["size"])
        except Exception:  # compiled code, which raises anything
            return None
    return value if isinstance(value, dict) and {"counts", "size"} <= value.keys() else None


def _read_categories(json_file: str | Path, content: dict[str, Any]) -> dict[int | str, str]:
    """Return the class names by id; numbers first, in ascending order."""
    entries = _read_entries(json_file, "categories", content["categories"], raise_error)
    names = {entry["id"]: entry["name"] for entry in entries}
    if len(names) < len(entries):
        number = Counter(entry["id"] for entry in entries).most_common(1)[0][0]
        raise DataError(
            f"{json_file}: several categories have the id {number}; remove all but one."
        )
    if _has_unused_parent(content):
        del names[0]
    if not names:
        raise DataError(f"{json_file} has an empty list of categories; name at least one class.")
    ordered = dict(sorted(names.items(), key=lambda item: (isinstance(item[0], str), item[0])))
    check_class_names(list(ordered.values()), str(json_file))
    return ordered


def _has_unused_parent(content: dict[str, Any]) -> bool:
    """Whether category 0 is Roboflow's parent of the others, which no object has."""
    roots = [c["id"] for c in content["categories"] if c.get("supercategory") == "none"]
    if roots != [0] or len(content["categories"]) == 1:
        return False
    used = (a.get("category_id") for a in content.get("annotations", []) if isinstance(a, dict))
    return all(number != 0 for number in used)


def read_categories(json_file: str) -> dict[int | str, str]:
    """Read the class names of a COCO json by category id, ascending; ids may have gaps.

    Raises:
        DataError: if the file is missing, broken or without categories.
    """
    path = Path(json_file)
    return dict(_categories(json_file, path.stat().st_mtime if is_file(path) else 0.0))


@lru_cache(maxsize=8)
def _categories(json_file: str, modified: float) -> tuple[tuple[int | str, str], ...]:
    return tuple(_read_categories(json_file, _parse(json_file)).items())


def load_checked_coco_json(
    json_file: str, image_root: str, name: str | None = None, *, labeled: bool = True
) -> list[dict]:
    """Load the records of a COCO json, in Detectron2's format, without unusable boxes.

    With `name`, the classes are written to the metadata of this dataset.

    Raises:
        DataError: if the file is broken, has no images, names images that do not exist, has other
            classes than the metadata of `name`, or, with `labeled`, no objects to learn.
    """
    content = read_coco_json(json_file)
    if labeled and not content.is_labeled:
        raise DataError(
            f"{json_file} lacks annotations; a COCO detection file has the lists "
            f"{', '.join(_FIELDS)}."
        )
    if name is not None:
        _set_metadata(name, json_file, content.categories)
    records = _make_records(content, image_root)
    check_records(records, json_file, image_root, labeled=labeled)
    return records


def _set_metadata(name: str, json_file: str, categories: dict[int | str, str]) -> None:
    classes, metadata = list(categories.values()), MetadataCatalog.get(name)
    known = list(metadata.get("thing_classes", classes))
    if known != classes:
        raise DataError(
            f"{json_file} has the classes {', '.join(classes)}, but dataset {name!r} was "
            f"registered with {', '.join(known)}; register it again."
        )
    labels = {number: label for label, number in enumerate(categories)}
    # The file may have other ids than when it was read before.
    vars(metadata).update(thing_classes=known, thing_dataset_id_to_contiguous_id=labels)


def read_coco_records(json_file: str, image_root: str, on_error: OnError) -> list[dict]:
    """Read the unchecked records of a COCO json, to inspect them.

    Raises:
        DataError: if the file is missing or not COCO.
    """
    return _make_records(read_coco_json(json_file, on_error), image_root)


def _make_records(content: CocoContent, image_root: str) -> list[dict[str, Any]]:
    """Convert to Detectron2's format, in ascending order of image ids."""
    labels = {number: label for label, number in enumerate(content.categories)}
    objects: dict[int | str, list[dict[str, Any]]] = defaultdict(list)
    for entry in content.annotations:
        annotation = {"iscrowd": entry["iscrowd"], "bbox": entry["bbox"]}
        annotation |= {"category_id": labels[entry["category_id"]], "bbox_mode": BoxMode.XYWH_ABS}
        if "segmentation" in entry:
            annotation["segmentation"] = entry["segmentation"]
        objects[entry["image_id"]].append(annotation)
    records = []
    images = {image["id"]: image for image in content.images}  # the check reports repeated ids
    for number in sorted(images, key=lambda key: (isinstance(key, str), key)):
        image = images[number]
        record = {"file_name": _image_path(image_root, image["file_name"]), "image_id": number}
        record |= {"height": image["height"], "width": image["width"]}
        records.append({**record, "annotations": objects[number]})
    return records


def _image_path(image_root: str, name: str) -> str:
    """Join folder and file name, which may have the backslashes of Windows."""
    if "://" in image_root or "://" in name:  # `Path` would make one slash of two
        return os.path.join(image_root, name)
    path = str(Path(image_root) / name)
    if "\\" in name and not is_file(path):
        return str(Path(image_root) / name.replace("\\", "/"))
    return path
