"""Class names of registered data sets, and the rule that ties them to the model."""

import difflib
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from ...config import SPARSE_DETECTORS
from ...errors import ConfigError, DataError
from .coco_json import read_categories

# Which part of MODEL has the number of classes of an architecture.
_CLASSES_OF = {"GeneralizedRCNN": "ROI_HEADS", **dict.fromkeys(SPARSE_DETECTORS, "SparseRCNN")}

__all__ = ["check_registered", "class_names", "resolve_num_classes"]


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
