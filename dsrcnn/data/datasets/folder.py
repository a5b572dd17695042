"""A folder with everything in it: COCO's, Pascal VOC's or YOLO's layout, told by its files."""

from functools import partial
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog

from ...errors import DataError
from .coco_json import claim_name, read_categories, read_coco_records
from .faults import Fail
from .voc import load_voc, read_voc, voc_classes, voc_splits
from .yolo import load_yolo, read_yolo, yolo_classes, yolo_splits

__all__ = [
    "coco_files",
    "folder_classes",
    "folder_kind",
    "folder_splits",
    "read_folder",
    "register_absent_folder",
    "register_folder",
]

_LAYOUTS = (
    "COCO: annotations/instances_<split>.json and images/<split>/; "
    "VOC: ImageSets/Main/<split>.txt, Annotations/ and JPEGImages/; YOLO: data.yaml"
)


def folder_kind(folder: Path) -> str:
    """One of "coco", "voc" and "yolo".

    Raises:
        DataError: if the folder is missing or of none of the layouts.
    """
    if not folder.is_dir():
        raise DataError(f"Folder {str(folder)!r} does not exist; correct DATASETS.CUSTOM.FOLDER.")
    if (folder / "data.yaml").is_file():
        return "yolo"
    if (folder / "ImageSets/Main").is_dir():
        return "voc"
    if list((folder / "annotations").glob("instances_*.json")):
        return "coco"
    raise DataError(f"{folder} has none of the known layouts. {_LAYOUTS}.")


def coco_files(folder: Path, split: str) -> tuple[str, str]:
    """Annotation file and image folder of a split; names of images may hold the folder already.

    Raises:
        DataError: if there is no such file.
    """
    annotations = folder / "annotations" / f"instances_{split}.json"
    if not annotations.is_file():
        raise DataError(
            f"{annotations} does not exist; the splits of {folder} are "
            f"{', '.join(folder_splits(folder))}."
        )
    choices = (folder / "images" / split, folder / split, folder / "images", folder)
    return str(annotations), str(next(path for path in choices if path.is_dir()))


def folder_classes(folder: Path, splits: list[str]) -> list[str]:
    """Class names of a VOC or YOLO folder, in the order of their labels.

    Raises:
        DataError: if files are missing or broken.
    """
    _check_splits(folder, splits)
    if folder_kind(folder) == "yolo":
        return yolo_classes(folder)
    return voc_classes(folder, splits)


def register_folder(name: str, folder: Path, split: str, classes: list[str]) -> None:
    """Register a split of a VOC or YOLO folder under `name`; it is read when it is first used.

    Raises:
        DataError: if something else is registered under `name`.
    """
    load = load_yolo if folder_kind(folder) == "yolo" else load_voc
    claim_name(name)
    DatasetCatalog.register(name, partial(load, folder, split, classes))
    MetadataCatalog.get(name).set(evaluator_type="coco", thing_classes=classes)


def register_absent_folder(name: str, folder: Path, classes: list[str]) -> None:
    """Register `name` for its class names alone; reading it says that the folder is missing.

    Raises:
        DataError: if something else is registered under `name`.
    """
    claim_name(name)
    DatasetCatalog.register(name, partial(folder_kind, folder))
    MetadataCatalog.get(name).set(evaluator_type="coco", thing_classes=classes)


def read_folder(folder: Path, split: str, fail: Fail) -> tuple[list[str], list[dict]]:
    """Class names and records of a split as they are, for a look at them.

    Raises:
        DataError: if the folder cannot be read at all.
    """
    kind = folder_kind(folder)
    if kind == "coco":
        annotations, images = coco_files(folder, split)
        names = [c["name"] for c in read_categories(annotations)]
        return names, read_coco_records(annotations, images, fail)
    classes = folder_classes(folder, folder_splits(folder))
    read = read_yolo if kind == "yolo" else read_voc
    return classes, read(folder, split, classes, fail)


def folder_splits(folder: Path) -> list[str]:
    """Names of the splits that a folder has.

    Raises:
        DataError: if it has none.
    """
    kind = folder_kind(folder)
    if kind == "coco":
        files = (folder / "annotations").glob("instances_*.json")
        return sorted(path.stem.removeprefix("instances_") for path in files)
    found = yolo_splits(folder) if kind == "yolo" else voc_splits(folder)
    if not found:
        where = "data.yaml names no train, val or test" if kind == "yolo" else "no ImageSets/Main"
        raise DataError(f"{folder} has no splits: {where}.")
    return found


def _check_splits(folder: Path, splits: list[str]) -> None:
    known = folder_splits(folder)
    for split in splits:
        if split not in known:
            raise DataError(f"{folder} has no split {split!r}; it has {', '.join(known)}.")
