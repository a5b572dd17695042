"""A trained model, and the images to look at with it."""

from typing import Any, cast

import numpy as np
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog
from detectron2.engine import DefaultPredictor
from torch import Tensor, nn

from ..config import CASCADES, add_dsrcnn_config
from ..data.build import explain_data_errors
from ..data.mapper import DetectionMapper
from ..engine.checkpoint import ReportingCheckpointer
from ..errors import ConfigError, DataError
from ..modeling.decoder import Cascade
from ..visualization.draw import spread

__all__ = [
    "as_bgr",
    "expect_cascade",
    "load_predictor",
    "predict_at_every_stage",
    "training_images",
]


def training_images(cfg: CfgNode, count: int) -> list[dict[str, Any]]:
    """Model inputs for training images that have annotations, without random augmentation.

    Args:
        cfg: for ``DATASETS.TRAIN`` and the input size of testing.
        count: how many, spread evenly over the first training set.

    Raises:
        DataError: if the training set cannot be read or has no annotation.
    """
    if not cfg.DATASETS.TRAIN:
        raise DataError(
            "DATASETS.TRAIN is empty, so there are no images to draw. Write a registered name, or "
            "DATASETS.CUSTOM.TRAIN_JSON and TRAIN_IMAGES."
        )
    plain = cfg.clone()
    plain.defrost()
    plain.INPUT.AUG = add_dsrcnn_config(get_cfg()).INPUT.AUG
    plain.INPUT.RANDOM_FLIP = "none"
    plain.INPUT.CROP.ENABLED = False
    plain.INPUT.MIN_SIZE_TRAIN_SAMPLING = "choice"
    plain.INPUT.MIN_SIZE_TRAIN = (cfg.INPUT.MIN_SIZE_TEST,)
    plain.INPUT.MAX_SIZE_TRAIN = cfg.INPUT.MAX_SIZE_TEST
    name = cfg.DATASETS.TRAIN[0]
    with explain_data_errors(name):
        records = [r for r in DatasetCatalog.get(name) if r["annotations"]]
    if not records:
        raise DataError(f"No image of {name} has an annotation, so there is nothing to draw.")
    mapper = DetectionMapper(plain, is_train=True)
    return [mapper(records[index]) for index in spread(len(records), count)]


def as_bgr(image: Tensor, order: str) -> np.ndarray:
    """A model input (3, H, W) as a picture (H, W, 3) uint8; `order` is ``INPUT.FORMAT``."""
    array = image.permute(1, 2, 0).byte().cpu().numpy()
    return np.ascontiguousarray(array[..., ::-1] if order == "RGB" else array)


def expect_cascade(cfg: CfgNode, command: str) -> None:
    """Refuse architectures that have no cascade of stages.

    Raises:
        ConfigError: naming the architecture and those that have one.
    """
    found = cfg.MODEL.META_ARCHITECTURE
    if found not in CASCADES:
        raise ConfigError(
            f"{command} looks at the stages of a cascade, and MODEL.META_ARCHITECTURE {found} has "
            f"none. Use it with a config of {', '.join(CASCADES)}."
        )


def predict_at_every_stage(model: nn.Module) -> None:
    """Let a cascade at rest give the predictions of all stages, as it would of the last.

    It is the plain cascade, whatever training recollects, and nothing is dropped.
    """
    head = cast(Cascade, model.head)
    head.recollects = False
    head.training = True  # the flag of the cascade itself; its stages stay in evaluation mode


def load_predictor(cfg: CfgNode) -> DefaultPredictor:
    """Detectron2's predictor, but never with weights that are partly random."""
    bare = cfg.clone()
    bare.defrost()
    bare.MODEL.WEIGHTS = ""
    bare.MODEL.TIMM.PRETRAINED, bare.MODEL.TIMM.WEIGHTS = False, ""  # the file has all
    predictor = DefaultPredictor(bare)
    average, trust = cfg.MODEL.EMA.ENABLED, cfg.MODEL.TRUST_WEIGHTS
    checkpointer = ReportingCheckpointer(
        predictor.model, strict=True, prefer_average=average, trust=trust
    )
    checkpointer.load(cfg.MODEL.WEIGHTS)
    return predictor
