"""One's own data from the config alone: ``DATASETS.CUSTOM``."""

from collections.abc import Sequence
from pathlib import Path

from detectron2.config import CfgNode

from ...errors import ConfigError, DataError
from .coco_json import read_categories, register_coco_json
from .folder import (
    coco_files,
    folder_classes,
    folder_kind,
    register_absent_folder,
    register_folder,
)

__all__ = ["use_custom_data"]

_SAVED = "DATASETS.CUSTOM.CLASSES"


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
