"""One's own data from the config alone: ``DATASETS.CUSTOM``."""

from pathlib import Path

from detectron2.config import CfgNode

from ...errors import ConfigError, DataError
from .coco_json import read_categories, register_coco_json
from .folder import coco_files, folder_classes, folder_kind, register_folder

__all__ = ["use_custom_data"]


def use_custom_data(cfg: CfgNode) -> None:
    """Register the data of ``DATASETS.CUSTOM`` and make them the data sets of `cfg`, in place.

    Registers ``NAME_train`` and ``NAME_test`` and writes them to ``DATASETS.TRAIN`` and ``.TEST``.
    Class names come from the data, of COCO files from the training json, else from the test json,
    and are stored in ``DATASETS.CUSTOM.CLASSES``, so that a saved config knows them where the data
    are not.

    Raises:
        ConfigError: if data are given without a name, or a folder and files.
        DataError: if a file cannot be read, or two files name different classes.
    """
    node = cfg.DATASETS.CUSTOM
    if node.FOLDER and _use_folder(cfg):
        return
    files = {"TRAIN": node.TRAIN_JSON, "TEST": node.TEST_JSON}
    if not node.NAME:
        if any(files.values()):
            raise ConfigError(
                "DATASETS.CUSTOM has a json but no name; write DATASETS.CUSTOM.NAME, for example "
                f"{Path(next(f for f in files.values() if f)).stem}."
            )
        return
    classes = _class_names([f for f in files.values() if f], list(node.CLASSES))
    node.CLASSES = tuple(classes)
    for split, json_file in files.items():
        if json_file:
            name = f"{node.NAME}_{split.lower()}"
            register_coco_json(name, json_file, node[f"{split}_IMAGES"], classes)
            cfg.DATASETS[split] = (name,)
        else:
            cfg.DATASETS[split] = ()


def _use_folder(cfg: CfgNode) -> bool:
    """Register a VOC or YOLO folder; of COCO's layout only find the files."""
    node = cfg.DATASETS.CUSTOM
    folder = Path(node.FOLDER)
    node.NAME = node.NAME or folder.resolve().name
    if node.TRAIN_JSON or node.TEST_JSON:
        # Found in it before, and saved; where a trained model is used, the folder may be missing.
        if not folder.is_dir() or folder_kind(folder) == "coco":
            return False
        raise ConfigError("DATASETS.CUSTOM has a FOLDER and json files; write one or the other.")
    splits = {"TRAIN": node.TRAIN_SPLIT, "TEST": node.TEST_SPLIT}
    used = [split for split in splits.values() if split]
    names = {key: f"{node.NAME}_{key.lower()}" for key in splits}
    if folder.is_dir() or not node.CLASSES:
        if folder_kind(folder) == "coco":
            for key, split in splits.items():
                if split:
                    node[f"{key}_JSON"], node[f"{key}_IMAGES"] = coco_files(folder, split)
            return False
        node.CLASSES = tuple(folder_classes(folder, used))
        for key, split in splits.items():
            if split:
                register_folder(names[key], folder, split, list(node.CLASSES))
    for key, split in splits.items():
        cfg.DATASETS[key] = (names[key],) if split else ()
    return True


def _class_names(files: list[str], saved: list[str]) -> list[str]:
    if not files:
        raise ConfigError(
            "DATASETS.CUSTOM has a name but no json; write DATASETS.CUSTOM.TRAIN_JSON or TEST_JSON."
        )
    # Where a trained model is used, some or all of its files may be missing: the saved names count.
    present = [f for f in files if not saved or Path(f).is_file()]
    names = {f: [c["name"] for c in read_categories(f)] for f in present}
    if len(present) < len(files):
        names = {"DATASETS.CUSTOM.CLASSES": saved, **names}
    first, *others = names
    for other in others:
        if names[other] != names[first]:
            raise DataError(
                f"{first} and {other} name different classes: {', '.join(names[first])} against "
                f"{', '.join(names[other])}. Both need the same categories."
            )
    return names[first]
