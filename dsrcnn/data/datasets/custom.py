"""One's own data from the config alone: ``DATASETS.CUSTOM``."""

import difflib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from ...config import SPARSE_DETECTORS
from ...config.load import config_step
from ...errors import ConfigError, DataError
from .coco import claim_name, read_categories, read_coco_records, register_coco_json
from .validate import Fail
from .voc import load_voc, read_voc, voc_classes, voc_splits
from .yolo import load_yolo, read_yolo, yolo_classes, yolo_splits

__all__ = [
    "check_registered",
    "class_names",
    "coco_files",
    "folder_classes",
    "folder_kind",
    "folder_splits",
    "read_folder",
    "register_absent_folder",
    "register_folder",
    "resolve_num_classes",
    "use_custom_data",
]

# Which part of MODEL has the number of classes of an architecture.
_CLASSES_OF = {"GeneralizedRCNN": "ROI_HEADS", **dict.fromkeys(SPARSE_DETECTORS, "SparseRCNN")}


def check_registered(name: str) -> None:
    """Raise a `DataError` with close names if no data set is registered under `name`."""
    if name not in DatasetCatalog.list():
        close = difflib.get_close_matches(name, DatasetCatalog.list(), n=3, cutoff=0.5)
        raise DataError(
            f"Data set {name!r} is not registered."
            + (f" Did you mean {', '.join(close)}?" if close else "")
            + " For your own COCO json set DATASETS.CUSTOM (see datasets/README.md)."
        )


def class_names(name: str) -> list[str] | None:
    """Names of the classes of a registered data set, None if they are not known.

    Detectron2 fills them in only once a json was loaded, so they may have to be read from it.
    """
    if name not in DatasetCatalog.list():
        return None
    metadata = MetadataCatalog.get(name)
    names = metadata.get("thing_classes")
    json_file = metadata.get("json_file")
    if names is None and json_file and Path(json_file).is_file():
        names = [c["name"] for c in read_categories(json_file)]
    return names


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


_SAVED = "DATASETS.CUSTOM.CLASSES"


@config_step
def use_custom_data(cfg: CfgNode) -> None:
    """Register the data of ``DATASETS.CUSTOM`` and make them the data sets of `cfg`, in place.

    Registers ``NAME_train`` and ``NAME_test`` and writes them to ``DATASETS.TRAIN`` and ``.TEST``.
    Class names come from the data and are stored in ``DATASETS.CUSTOM.CLASSES``, so that a saved
    config knows them where the data are not, or are others: data must then name the same.

    Raises:
        ConfigError: if data are given without a name, or a folder and files.
        DataError: if a file cannot be read, or classes differ.
    """
    node = cfg.DATASETS.CUSTOM
    files = {"TRAIN": node.TRAIN_JSON, "TEST": node.TEST_JSON}
    if node.FOLDER:
        if any(files.values()):
            raise ConfigError(
                "DATASETS.CUSTOM has a FOLDER and json files; write one or the other."
            )
        _use_folder(cfg)
    elif node.NAME:
        images = {key: node[f"{key}_IMAGES"] for key in files}
        _use_files(cfg, {key: (path, images[key]) for key, path in files.items() if path})
    elif any(files.values()):
        raise ConfigError(
            "DATASETS.CUSTOM has a json but no name; write DATASETS.CUSTOM.NAME, for example "
            f"{Path(next(f for f in files.values() if f)).stem}."
        )


@config_step
def resolve_num_classes(cfg: CfgNode) -> None:
    """Make the model fit the training data.

    The rule: ``MODEL.SparseRCNN.NUM_CLASSES 0``, or ``MODEL.ROI_HEADS.NUM_CLASSES 0`` of Faster
    R-CNN, becomes the number of classes of the first training
    set (or test set, where there is no training set); any other number must be equal to it.

    Raises:
        ConfigError: if the numbers differ.
        DataError: if the number is to come from data sets that are not registered, or if data sets
            name different classes.
    """
    part = _CLASSES_OF.get(cfg.MODEL.META_ARCHITECTURE)
    if part is None:
        return
    node, key = cfg.MODEL[part], f"MODEL.{part}.NUM_CLASSES"
    if node.NUM_CLASSES == 0:
        for name in cfg.DATASETS.TRAIN:
            check_registered(name)
    first: tuple[str, list[str]] | None = None
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        names = class_names(name)
        if names is None:
            continue
        first = first or (name, names)
        if len(names) == len(first[1]) and names != first[1]:
            index = next(i for i, found in enumerate(names) if found != first[1][i])
            raise DataError(
                f"Data sets {first[0]!r} and {name!r} name different classes: number {index} is "
                f"{first[1][index]!r} in one and {names[index]!r} in the other. A model can be "
                "trained and evaluated on data sets of the same classes only."
            )
        if node.NUM_CLASSES == 0:
            node.NUM_CLASSES = len(names)
        if len(names) != node.NUM_CLASSES:
            shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            raise ConfigError(
                f"{key} is {node.NUM_CLASSES}, but data set {name!r} has {len(names)} classes "
                f"({shown}). Write {key} {len(names)}, or 0 to take the number from the data."
            )


def _use_folder(cfg: CfgNode) -> None:
    node = cfg.DATASETS.CUSTOM
    folder, saved = Path(node.FOLDER), list(node.CLASSES)
    node.NAME = node.NAME or folder.resolve().name
    splits = {"TRAIN": node.TRAIN_SPLIT, "TEST": node.TEST_SPLIT}
    used = {key: split for key, split in splits.items() if split}
    if folder.is_dir() and folder_kind(folder) == "coco":
        _use_files(cfg, {key: coco_files(folder, split) for key, split in used.items()})
        return
    if not folder.is_dir() and saved:  # a trained model may be used without its data
        for key in used:
            register_absent_folder(_name(cfg, key), folder, saved)
    else:
        # VOC lists its classes nowhere: a split may lack some that the model knows.
        given = saved if folder_kind(folder) == "voc" and saved else None
        classes = given or folder_classes(folder, list(used.values()))
        if saved:
            _check_same({_SAVED: saved, str(folder): classes})
        node.CLASSES = tuple(classes)
        for key, split in used.items():
            register_folder(_name(cfg, key), folder, split, classes)
    _make_data_sets(cfg, used)


def _use_files(cfg: CfgNode, files: dict[str, tuple[str, str]]) -> None:
    """Use COCO files, given with the folders of their images by the key of their split."""
    node = cfg.DATASETS.CUSTOM
    classes = _class_names([path for path, _ in files.values()], list(node.CLASSES))
    node.CLASSES = tuple(classes)
    for key, (path, images) in files.items():
        register_coco_json(_name(cfg, key), path, images, classes)
    _make_data_sets(cfg, files)


def _name(cfg: CfgNode, key: str) -> str:
    return f"{cfg.DATASETS.CUSTOM.NAME}_{key.lower()}"


def _make_data_sets(cfg: CfgNode, keys: dict) -> None:
    for key in ("TRAIN", "TEST"):
        cfg.DATASETS[key] = (_name(cfg, key),) if key in keys else ()


def _class_names(files: list[str], saved: list[str]) -> list[str]:
    if not files:
        raise ConfigError(
            "DATASETS.CUSTOM has a name but no json; write DATASETS.CUSTOM.TRAIN_JSON or TEST_JSON."
        )
    # Where a trained model is used, some or all of its files may be missing: the saved names count.
    present = [f for f in files if not saved or Path(f).is_file()]
    names: dict[str, Sequence[str]] = {_SAVED: saved} if saved else {}
    names |= {f: [c["name"] for c in read_categories(f)] for f in present}
    _check_same(names)
    return list(next(iter(names.values())))


def _check_same(names: dict[str, Sequence[str]]) -> None:
    first, *others = names
    for other in others:
        if list(names[other]) != list(names[first]):
            advice = "Both need the same categories."
            if first == _SAVED:
                advice += f" For a new model write {_SAVED} () to take those of the data."
            raise DataError(
                f"{first} and {other} name different classes: {', '.join(names[first])} against "
                f"{', '.join(names[other])}. {advice}"
            )
