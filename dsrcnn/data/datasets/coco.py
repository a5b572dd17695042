"""Any COCO json as a data set, with its faults reported once and in plain words."""

import json
from collections import Counter
from functools import lru_cache, partial
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.structures import BoxMode

from ...errors import DataError
from .validate import Fail, check_records

__all__ = [
    "claim_name",
    "load_checked_coco_json",
    "read_categories",
    "read_coco_json",
    "read_coco_records",
    "register_coco_json",
]

_REGISTERED: set[str] = set()  # by this module
_ENTRIES = {  # what every entry of the three lists of a COCO detection file has
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}


def register_coco_json(name: str, json_file: str, image_root: str, classes: list[str]) -> None:
    """Register a COCO json under `name`; the file is loaded when it is first used.

    Registering the same name again replaces it, so a notebook cell can be run twice.

    Args:
        name: data set name.
        json_file: annotations.
        image_root: folder that ``file_name`` entries are relative to.
        classes: class names in the order of ascending category id.

    Raises:
        DataError: if something else is registered under `name`.
    """
    claim_name(name)
    DatasetCatalog.register(name, partial(load_checked_coco_json, json_file, image_root, name))
    MetadataCatalog.get(name).set(
        json_file=json_file, image_root=image_root, evaluator_type="coco", thing_classes=classes
    )


def claim_name(name: str) -> None:
    """Make room for a data set that is about to be registered.

    Raises:
        DataError: if another program has registered one under `name`.
    """
    if name in DatasetCatalog.list() and name not in _REGISTERED:
        raise DataError(
            f"Data set {name!r} is registered already, by Detectron2 or by another program; choose "
            "another DATASETS.CUSTOM.NAME."
        )
    if name in DatasetCatalog.list():
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)  # whoever registered the name may have given none
    _REGISTERED.add(name)


def read_coco_json(json_file: str) -> dict:
    """Parse a COCO json and check that its three lists and their entries are complete.

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
    missing = [k for k in _ENTRIES if not isinstance(lists.get(k), list)]
    if missing:
        raise DataError(
            f"{json_file} lacks {', '.join(missing)}; a COCO detection file has the lists "
            f"{', '.join(_ENTRIES)}."
        )
    for part, keys in _ENTRIES.items():
        for index, entry in enumerate(content[part]):
            entry = entry if isinstance(entry, dict) else {}
            lacking = [k for k in keys if entry.get(k) in (None, "", [])]
            if lacking:
                raise DataError(
                    f"{json_file}: {part}[{index}] lacks {', '.join(lacking)}; every entry of "
                    f"{part} needs {', '.join(keys)}."
                )
    if not content["categories"]:
        raise DataError(f"{json_file} has an empty list of categories; name at least one class.")
    return content


@lru_cache(maxsize=8)
def _categories(json_file: str, modified: float) -> tuple[tuple[int, str], ...]:
    return tuple(sorted((c["id"], c["name"]) for c in read_coco_json(json_file)["categories"]))


def read_categories(json_file: str) -> list[dict]:
    """Categories of a COCO json, ascending by id; ids may have gaps.

    Raises:
        DataError: if the file is missing, broken or without categories.
    """
    path = Path(json_file)
    modified = path.stat().st_mtime if path.is_file() else 0.0
    return [{"id": i, "name": name} for i, name in _categories(json_file, modified)]


def read_coco_records(json_file: str, image_root: str, fail: Fail) -> list[dict]:
    """Records of a COCO json as they are, for a look at them; training loads them by Detectron2.

    Raises:
        DataError: if the file is missing or no COCO json.
    """
    content = read_coco_json(json_file)
    for part in ("images", "annotations"):
        for number in _repeated(content[part]):
            fail("id", f"{json_file}: several {part} have the id {number}.")
    labels = {c["id"]: index for index, c in enumerate(read_categories(json_file))}
    records = {
        image["id"]: {
            **{key: image[key] for key in ("height", "width")},
            "file_name": str(Path(image_root) / image["file_name"]),
            "image_id": image["id"],
            "annotations": [],
        }
        for image in content["images"]
    }
    for entry in content["annotations"]:
        where = f"{json_file}: annotation {entry['id']}"
        if entry["image_id"] not in records:
            fail("annotation", f"{where} is of image {entry['image_id']}, which is not listed.")
        elif entry["category_id"] not in labels:
            fail("class", f"{where} has category {entry['category_id']}, which is not listed.")
        else:
            box = {"bbox": entry["bbox"], "bbox_mode": BoxMode.XYWH_ABS}
            label = {"category_id": labels[entry["category_id"]]}
            crowd = {"iscrowd": entry.get("iscrowd", 0)}
            records[entry["image_id"]]["annotations"].append({**box, **label, **crowd})
    return list(records.values())


def _repeated(entries: list[dict]) -> list:
    counts = Counter(entry["id"] for entry in entries)
    return [number for number, count in counts.items() if count > 1]


def load_checked_coco_json(json_file: str, image_root: str, name: str) -> list[dict]:
    """Records of a COCO json without unusable boxes, see `check_records`.

    Args:
        json_file: annotations.
        image_root: folder of the images.
        name: registered data set name.

    Returns:
        Records in Detectron2's format.

    Raises:
        DataError: if the file is broken, has no images or boxes, or names images that do not exist.
    """
    content = read_coco_json(json_file)  # Detectron2's reader would fail with a bare KeyError
    for part in ("images", "annotations"):  # it would also pass over an image in silence
        if repeated := _repeated(content[part]):
            raise DataError(
                f"{json_file}: several {part} have the id {repeated[0]}; number them anew."
            )
    try:
        records = load_coco_json(json_file, image_root, name)
    except (AssertionError, KeyError, IndexError) as error:
        raise DataError(f"{json_file} cannot be used: {error}") from error
    check_records(records, json_file, image_root)
    return records
