"""COCO json files as datasets, with one clear message for each kind of fault."""

import json
from collections import Counter
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from ...errors import DataError
from .validate import OnError, check_records, make_annotation

_REGISTERED: set[str] = set()  # names registered by this package
_REQUIRED_KEYS = {  # of each entry of the lists of a COCO detection file
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}


def register_coco_json(name: str, json_file: str, image_root: str, classes: list[str]) -> None:
    """Register a COCO json under `name`; the file is read on first use.

    Registering a name again replaces the dataset, so that a notebook cell can run twice. Entries
    ``file_name`` are relative to `image_root`; `classes` are in ascending order of category ids.

    Raises:
        DataError: if another program registered `name`.
    """
    reserve_name(name)
    DatasetCatalog.register(name, partial(load_checked_coco_json, json_file, image_root, name))
    MetadataCatalog.get(name).set(
        json_file=json_file, image_root=image_root, evaluator_type="coco", thing_classes=classes
    )


def reserve_name(name: str) -> None:
    """Remove an earlier registration of `name` by this package.

    Raises:
        DataError: if another program registered `name`.
    """
    if name in DatasetCatalog.list() and name not in _REGISTERED:
        raise DataError(
            f"Dataset {name!r} is registered already, by Detectron2 or by another program; choose "
            "another DATASETS.CUSTOM.NAME."
        )
    if name in DatasetCatalog.list():
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)  # may have been registered without metadata
    _REGISTERED.add(name)


def read_coco_json(json_file: str) -> dict:
    """Read a COCO json and check that its lists and their entries are complete.

    Raises:
        DataError: if the file is missing, not JSON or not COCO.
    """
    path = Path(json_file)
    if not path.is_file():
        raise DataError(f"Annotation file {json_file!r} does not exist; check the path.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{json_file} is not valid JSON ({error}); export it again.") from error
    lists = content if isinstance(content, dict) else {}
    missing = [k for k in _REQUIRED_KEYS if not isinstance(lists.get(k), list)]
    if missing:
        raise DataError(
            f"{json_file} lacks {', '.join(missing)}; a COCO detection file has the lists "
            f"{', '.join(_REQUIRED_KEYS)}."
        )
    for part, required in _REQUIRED_KEYS.items():
        for index, entry in enumerate(content[part]):
            entry = entry if isinstance(entry, dict) else {}
            missing = [k for k in required if entry.get(k) in (None, "", [])]
            if missing:
                raise DataError(
                    f"{json_file}: {part}[{index}] lacks {', '.join(missing)}; every entry of "
                    f"{part} needs {', '.join(required)}."
                )
    if not content["categories"]:
        raise DataError(f"{json_file} has an empty list of categories; name at least one class.")
    return content


def read_categories(json_file: str) -> dict[int, str]:
    """Read the class names of a COCO json by category id, ascending; ids may have gaps.

    Raises:
        DataError: if the file is missing, broken or without categories.
    """
    path = Path(json_file)
    return dict(_categories(json_file, path.stat().st_mtime if path.is_file() else 0.0))


@lru_cache(maxsize=8)
def _categories(json_file: str, modified: float) -> tuple[tuple[int, str], ...]:
    return tuple(sorted((c["id"], c["name"]) for c in read_coco_json(json_file)["categories"]))


def load_checked_coco_json(json_file: str, image_root: str, name: str) -> list[dict]:
    """Load the records of a COCO json, in Detectron2's format, without unusable boxes.

    Raises:
        DataError: if the file is broken, has no images or boxes, or names images that do not exist.
    """
    content = read_coco_json(json_file)  # Detectron2's reader would raise a bare KeyError
    for part in ("images", "annotations"):  # and silently skip an image with a duplicate id
        if duplicates := _duplicate_ids(content[part]):
            raise DataError(
                f"{json_file}: several {part} have the id {duplicates[0]}; number them again."
            )
    try:
        records = load_coco_json(json_file, image_root, name)
    except (AssertionError, KeyError, IndexError) as error:
        raise DataError(f"{json_file} cannot be used: {error}") from error
    check_records(records, json_file, image_root)
    return records


def read_coco_records(json_file: str, image_root: str, on_error: OnError) -> list[dict]:
    """Read the unchecked records of a COCO json, to inspect them.

    Raises:
        DataError: if the file is missing or not COCO.
    """
    content = read_coco_json(json_file)
    for part in ("images", "annotations"):
        for number in _duplicate_ids(content[part]):
            on_error("duplicate id", f"{json_file}: several {part} have the id {number}.")
    labels = {number: label for label, number in enumerate(read_categories(json_file))}
    records: dict[Any, dict[str, Any]] = {}
    for image in content["images"]:
        record = {"height": image["height"], "width": image["width"], "image_id": image["id"]}
        path = str(Path(image_root) / image["file_name"])
        records[image["id"]] = {"file_name": path, **record, "annotations": []}
    for entry in content["annotations"]:
        where = f"{json_file}: annotation {entry['id']}"
        image_id, category = entry["image_id"], entry["category_id"]
        if image_id not in records:
            text = f"{where} belongs to image {image_id}, which is not listed."
            on_error("annotation broken", text)
        elif category not in labels:
            on_error("unknown class", f"{where} has category {category}, which is not listed.")
        else:
            is_crowd = bool(entry.get("iscrowd", 0))
            annotation = make_annotation(entry["bbox"], labels[category], is_crowd=is_crowd)
            records[image_id]["annotations"].append(annotation)
    return list(records.values())


def _duplicate_ids(entries: list[dict]) -> list:
    counts = Counter(entry["id"] for entry in entries)
    return [number for number, count in counts.items() if count > 1]
