"""Your own data from the config alone: ``DATASETS.CUSTOM``, folder layouts, class counts."""

import contextlib
import difflib
import functools
import logging
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from ...config.load import config_step
from ...config.validate import num_classes_key
from ...errors import ConfigError, DataError
from ..files import file_fault, is_file, is_folder
from .coco import (
    is_plain_coco,
    is_taken,
    load_checked_coco_json,
    read_categories,
    read_coco_records,
    register_coco_json,
    register_loader,
)
from .fields import check_class_names
from .validate import OnError, check_records, raise_error
from .voc import read_voc, voc_classes, voc_splits
from .yolo import read_yolo, yolo_classes, yolo_split_fault, yolo_splits

_LOGGER = logging.getLogger(__name__)
_CLASSES_KEY = "DATASETS.CUSTOM.CLASSES"
_SOURCES: dict[str, tuple[str, ...]] = {}  # by name of the datasets that are registered here
_ROBOFLOW = "_annotations.coco.json"  # in the folder of each split, beside the images
_LAYOUTS = (
    "COCO: annotations/instances_<split>.json and images/<split>/, or "
    "<split>/_annotations.coco.json; VOC: ImageSets/Main/<split>.txt, Annotations/ and "
    "JPEGImages/; YOLO: data.yaml"
)


class _Part(NamedTuple):
    """Data to train or to test on.

    Attributes:
        source: what tells them from others: paths and class names.
        register: registers them under a name.
    """

    source: tuple[str, ...]
    register: Callable[[str], None]


@config_step
def use_custom_data(cfg: CfgNode) -> None:
    """Register the data of ``DATASETS.CUSTOM`` and use them in `cfg`, in place.

    Registers ``NAME_train`` and ``NAME_test`` and writes them to ``DATASETS.TRAIN`` and ``.TEST``.
    A folder without a name gets its own, with ``_custom`` if other datasets have that. Data of
    another config, which keep their name, add a number to it.
    Class names are read from the data and stored in ``DATASETS.CUSTOM.CLASSES``: a saved config
    knows its classes without the data, and rejects data with different classes.

    Raises:
        ConfigError: if files have no name, or both a folder and files are set.
        DataError: if a file cannot be read, or classes differ.
    """
    node, saved = cfg.DATASETS.CUSTOM, list(cfg.DATASETS.CUSTOM.CLASSES)
    files = {"train": node.TRAIN_JSON, "test": node.TEST_JSON}
    images = {"train": node.TRAIN_IMAGES, "test": node.TEST_IMAGES}
    splits = {"train": node.TRAIN_SPLIT, "test": node.TEST_SPLIT}
    if node.FOLDER and any(files.values()):
        raise ConfigError("DATASETS.CUSTOM has a FOLDER and json files; write one or the other.")
    if node.FOLDER:
        used = {part: split for part, split in splits.items() if split}
        classes, parts = _folder_parts(Path(node.FOLDER), used, saved)
    elif node.NAME:
        pairs = {part: (path, images[part]) for part, path in files.items() if path}
        classes, parts = _file_parts(pairs, saved)
    elif any(files.values()):
        raise ConfigError(
            "DATASETS.CUSTOM has a json but no name; write DATASETS.CUSTOM.NAME, for example "
            f"{Path(files['train'] or files['test']).stem}."
        )
    else:
        return
    node.NAME = _register(node.NAME, Path(os.path.abspath(node.FOLDER)).name, parts)
    node.CLASSES = tuple(classes)
    cfg.DATASETS.TRAIN = (f"{node.NAME}_train",) if "train" in parts else ()
    cfg.DATASETS.TEST = (f"{node.NAME}_test",) if "test" in parts else ()


def _register(given: str, default: str, parts: Mapping[str, _Part]) -> str:
    """Register parts under a name that no other data have, and return it.

    A config that is loaded later must not change what an earlier one trains on.
    """
    base = given or default
    while not given and any(is_taken(f"{base}_{part}") for part in ("train", "test")):
        base += "_custom"
    name, number = base, 1
    while any(_has_other_data(f"{name}_{key}", part) for key, part in parts.items()):
        number += 1
        name = f"{base}_{number}"
    if given and name != given:
        _LOGGER.info(
            "DATASETS.CUSTOM.NAME %s has other data in an earlier config of this program, so these "
            "are %s.",
            *(given, name),
        )
    for key, part in parts.items():
        part.register(f"{name}_{key}")
        _SOURCES[f"{name}_{key}"] = part.source
    return name


def _has_other_data(name: str, part: _Part) -> bool:
    is_ours = name in DatasetCatalog.list() and not is_taken(name)
    return is_ours and _SOURCES.get(name) != part.source


def _file_parts(
    files: Mapping[str, tuple[str, str]], saved: list[str]
) -> tuple[Sequence[str], dict[str, _Part]]:
    """Return the class names of COCO files, and their data with the folders of their images."""
    if not files:
        raise ConfigError(
            "DATASETS.CUSTOM has a name but no json; write DATASETS.CUSTOM.TRAIN_JSON or TEST_JSON."
        )
    names: dict[str, Sequence[str]] = {_CLASSES_KEY: saved} if saved else {}
    for json_file, _ in files.values():
        if not saved or is_file(json_file):  # a trained model may be used without its data
            names[json_file] = list(read_categories(json_file).values())
    _check_same_classes(names)
    classes = list(next(iter(names.values())))
    parts = {}
    for key, (json_file, image_root) in files.items():
        register = functools.partial(
            register_coco_json, json_file=json_file, image_root=image_root, classes=classes
        )
        source = (os.path.abspath(json_file), os.path.abspath(image_root), *classes)
        parts[key] = _Part(source, register)
    return classes, parts


def _folder_parts(
    folder: Path, splits: Mapping[str, str], saved: list[str]
) -> tuple[Sequence[str], dict[str, _Part]]:
    """Return the class names of a folder, and the data of its splits."""
    layout = _layout(folder) if is_folder(folder) or not saved else None
    if layout:
        splits = {part: find_split(folder, split) for part, split in splits.items()}
    if layout == "coco":
        return _file_parts(
            {part: _coco_files(folder, split) for part, split in splits.items()}, saved
        )
    # A trained model may be used without its data, and a split of VOC may lack some classes.
    classes = saved
    if not saved or layout == "yolo":
        classes = _folder_classes(folder, list(splits.values()), raise_error)
    if saved:
        _check_same_classes({_CLASSES_KEY: saved, str(folder): classes})
    parts = {}
    for part, split in splits.items():
        register = functools.partial(_register_split, folder=folder, split=split, classes=classes)
        parts[part] = _Part((os.path.abspath(folder), split, *classes), register)
    return classes, parts


def _register_split(name: str, folder: Path, split: str, classes: list[str]) -> None:
    load = functools.partial(load_split, folder, split, classes, labeled=False)
    register_loader(name, load)
    MetadataCatalog.get(name).set(evaluator_type="coco", thing_classes=classes)


def _check_same_classes(names: Mapping[str, Sequence[str]]) -> None:
    first, *others = names
    for other in others:
        if list(names[other]) != list(names[first]):
            advice = "Both need the same categories."
            if first == _CLASSES_KEY:
                advice += f" For a new model write {_CLASSES_KEY} () to use those of the data."
            raise DataError(
                f"{first} and {other} name different classes: {', '.join(names[first])} against "
                f"{', '.join(names[other])}. {advice}"
            )


def _layout(folder: Path) -> str:
    """Return the layout of a folder: "coco", "voc" or "yolo"."""
    if not is_folder(folder):
        fault = (file_fault(folder) or "is a file, ").split(", ")[0]
        fault += "" if fault == "does not exist" else ", not a folder"
        raise DataError(f"Folder {str(folder)!r} {fault}; correct DATASETS.CUSTOM.FOLDER.")
    if is_file(folder / "data.yaml"):
        return "yolo"
    if is_folder(folder / "ImageSets/Main"):
        return "voc"
    if _coco_splits(folder):
        return "coco"
    raise DataError(f"{folder} has none of the known layouts. {_LAYOUTS}.")


def _coco_splits(folder: Path) -> list[str]:
    files = (folder / "annotations").glob("instances_*.json")
    names = {path.stem.removeprefix("instances_") for path in files if is_file(path)}
    return sorted(names | {p.parent.name for p in folder.glob(f"*/{_ROBOFLOW}") if is_file(p)})


def folder_splits(folder: Path) -> list[str]:
    """List the splits of a folder.

    Raises:
        DataError: if it has none of the known layouts, or no splits.
    """
    layout = _layout(folder)
    if layout == "coco":
        return _coco_splits(folder)
    splits = yolo_splits(folder) if layout == "yolo" else voc_splits(folder)
    if not splits:
        fault = "no ImageSets/Main" if layout == "voc" else "data.yaml names no train, val or test"
        raise DataError(f"{folder} has no splits: {fault}.")
    return splits


def find_split(folder: Path, split: str) -> str:
    """Return the name that a folder has for a split, such as ``valid`` for ``val``.

    Raises:
        DataError: if it has no such split.
    """
    known = folder_splits(folder)
    names = (split, "valid") if split == "val" else (split,)
    for name in names:
        if name in known:
            return name
    raise DataError(
        f"{folder} has no split {split!r}; it has {', '.join(known)}. Name one of these, in a "
        "config with DATASETS.CUSTOM.TRAIN_SPLIT and TEST_SPLIT; an empty name is no split."
    )


def split_fault(folder: Path, split: str) -> str | None:
    """Explain why the files of a split that is named are absent; None if they exist."""
    return yolo_split_fault(folder, split) if _layout(folder) == "yolo" else None


def read_folder(folder: Path, split: str, on_error: OnError) -> tuple[list[str], list[dict]]:
    """Read the class names and unchecked records of a split, to inspect them.

    Raises:
        DataError: if the folder cannot be read at all.
    """
    layout = _layout(folder)
    if layout == "coco":
        json_file, image_root = _coco_files(folder, split)
        classes = list(read_categories(json_file).values())
        return classes, read_coco_records(json_file, image_root, on_error)
    classes = _folder_classes(folder, folder_splits(folder), lambda *_: None)
    read = read_yolo if layout == "yolo" else read_voc
    return classes, read(folder, split, classes, on_error)


def load_split(folder: Path, split: str, classes: list[str], *, labeled: bool) -> list[dict]:
    """Load a split of a folder for training, or without `labeled` for evaluation.

    Raises:
        DataError: as training does.
    """
    layout = _layout(folder)
    if layout == "coco":
        return load_checked_coco_json(*_coco_files(folder, split), labeled=labeled)
    read = read_yolo if layout == "yolo" else read_voc
    records = read(folder, split, classes, raise_error)
    check_records(records, f"Split {split!r} of {folder}", str(folder), labeled=labeled)
    return records


def _coco_files(folder: Path, split: str) -> tuple[str, str]:
    """Return annotation file and image folder of a split."""
    if is_file(folder / split / _ROBOFLOW):
        return str(folder / split / _ROBOFLOW), str(folder / split)
    annotations = folder / "annotations" / f"instances_{split}.json"
    # The file names may contain a folder themselves.
    choices = (folder / "images" / split, folder / split, folder / "images", folder)
    return str(annotations), str(next(path for path in choices if is_folder(path)))


def _folder_classes(folder: Path, splits: list[str], on_error: OnError) -> list[str]:
    """Return the class names of a VOC or YOLO folder, in the order of their labels."""
    is_yolo = _layout(folder) == "yolo"
    return yolo_classes(folder) if is_yolo else voc_classes(folder, splits, on_error)


def check_registered(name: str) -> None:
    """Raise a `DataError` with similar names if dataset `name` is not registered."""
    if name not in DatasetCatalog.list():
        close = difflib.get_close_matches(name, DatasetCatalog.list(), n=3, cutoff=0.5)
        hint = f" Did you mean {', '.join(close)}?" if close else ""
        raise DataError(
            f"Dataset {name!r} is not registered.{hint} For your own dataset DATASETS.CUSTOM (see "
            "datasets/README.md)."
        )


def class_names(name: str) -> list[str] | None:
    """Return the class names of a registered dataset, None if they are unknown.

    Detectron2 sets those of a json only when it is loaded, so they are read from it if necessary.
    The function of a user that reads a json may select or order classes in its own way: it runs.
    """
    if name not in DatasetCatalog.list():
        return None
    metadata = MetadataCatalog.get(name)
    names, json_file = metadata.get("thing_classes"), metadata.get("json_file")
    has_file = bool(json_file) and is_file(json_file)
    if names is None and has_file and not is_plain_coco(name):
        _run_once(DatasetCatalog[name])
        names = metadata.get("thing_classes")
    if names is None and has_file:
        names = list(read_categories(json_file).values())
    if names is None:
        return None
    where = f"The metadata of dataset {name!r}"
    if not isinstance(names, (list, tuple)):
        raise DataError(f"{where} has thing_classes {names!r}; set a list of class names.")
    return check_class_names(list(names), where)


@functools.lru_cache(maxsize=8)
def _run_once(load: Callable[[], object]) -> None:
    """Run the function of a dataset, which may set its metadata."""
    with contextlib.suppress(Exception):  # explained where the records are needed
        load()


def require_class_names(name: str) -> list[str]:
    """Return the class names of a registered dataset.

    Raises:
        DataError: if they are unknown.
    """
    check_registered(name)
    names = class_names(name)
    if names is None:
        raise DataError(
            f"Dataset {name!r} has no class names. Set MetadataCatalog.get({name!r}).thing_classes."
        )
    return names


@config_step
def resolve_num_classes(cfg: CfgNode) -> None:
    """Check the number of classes against the datasets, or read it from them, in place.

    The key is that of the architecture, such as ``MODEL.SparseRCNN.NUM_CLASSES``. 0 becomes the
    number of classes of the first training set, or test set if there is no training set. Any other
    number must match.

    Raises:
        ConfigError: if the numbers differ.
        DataError: if the number should come from datasets that are not registered, or datasets
            name different classes.
    """
    key = num_classes_key(cfg)
    if key is None:
        return
    *path, leaf = key.split(".")
    node = functools.reduce(operator.getitem, path, cfg)
    if node[leaf] == 0:
        for name in cfg.DATASETS.TRAIN:
            check_registered(name)
    first: tuple[str, list[str]] | None = None
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        names = class_names(name)
        if names is None:
            continue
        first = first or (name, names)
        if len(names) == len(first[1]) and names != first[1]:
            label = next(i for i, other in enumerate(first[1]) if names[i] != other)
            raise DataError(
                f"Datasets {first[0]!r} and {name!r} name different classes: number {label} is "
                f"{first[1][label]!r} in one and {names[label]!r} in the other. A model can be "
                "trained and evaluated on datasets of the same classes only."
            )
        if node[leaf] == 0:
            node[leaf] = len(names)
        if len(names) != node[leaf]:
            shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            if len(names) != len(first[1]):
                raise DataError(
                    f"Dataset {first[0]!r} has {len(first[1])} classes, but {name!r} has "
                    f"{len(names)} ({shown}). A model can be trained and evaluated on datasets of "
                    "the same classes only; give both the same categories."
                )
            raise ConfigError(
                f"{key} is {node[leaf]}, but dataset {name!r} has {len(names)} classes "
                f"({shown}). Write {key} {len(names)}, or 0 to take the number from the data."
            )
