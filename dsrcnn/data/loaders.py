"""Data loaders: Detectron2's, with this package's mapper and errors."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader, build_detection_train_loader

from ..errors import DataError
from .datasets.classes import check_registered
from .mapper import DetectionMapper

__all__ = ["build_test_loader", "build_train_loader", "explain_data_errors"]


def build_train_loader(cfg: CfgNode) -> Any:
    """Endless loader over ``DATASETS.TRAIN``.

    Raises:
        DataError: if a data set is unknown, missing on disk or has nothing to learn.
    """
    if not cfg.DATASETS.TRAIN:
        raise DataError(
            "DATASETS.TRAIN is empty. Write a registered name, such as shapes_train, or set "
            "DATASETS.CUSTOM.TRAIN_JSON."
        )
    with explain_data_errors(*cfg.DATASETS.TRAIN):
        return build_detection_train_loader(cfg, mapper=DetectionMapper(cfg, is_train=True))


def build_test_loader(cfg: CfgNode, name: str) -> Any:
    """Loader that goes once over data set `name`.

    Raises:
        DataError: if the data set is unknown, missing on disk or empty.
    """
    with explain_data_errors(name):
        return build_detection_test_loader(cfg, name, mapper=DetectionMapper(cfg, is_train=False))


@contextmanager
def explain_data_errors(*names: str) -> Iterator[None]:
    """Turn what Detectron2 raises about a data set into a message that says what to do."""
    for name in names:
        check_registered(name)
    shown = ", ".join(names)
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(
            f"Data set {shown} is not on this machine: {error.filename} does not exist. Put it "
            "where datasets/README.md says, or set DETECTRON2_DATASETS to its parent folder."
        ) from error
    except AssertionError as error:
        raise DataError(f"Data set {shown} cannot be used: {error}") from error
