"""Predictions beside ground truth, drawn for a trained model."""

from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.structures import BoxMode, Instances
from torch import Tensor, nn

from ..config import CASCADES, add_dsrcnn_config
from ..data.loaders import explain_data_errors
from ..data.mapper import DetectionMapper, read_image
from ..errors import ConfigError, DataError
from ..modeling.decoder import Cascade
from ..visualization import draw_boxes, side_by_side
from .checkpoint import ReportingCheckpointer

__all__ = [
    "as_bgr",
    "draw_predictions",
    "expect_cascade",
    "load_predictor",
    "picture_of",
    "predict_at_every_stage",
    "spread",
    "training_images",
]


def draw_predictions(
    cfg: CfgNode,
    output: str | Path,
    *,
    images: int = 8,
    threshold: float = 0.3,
) -> list[Path]:
    """Write pictures of the first test set: ground truth at the left, predictions at the right.

    Args:
        cfg: with ``MODEL.WEIGHTS`` and ``DATASETS.TEST``.
        output: folder to write to.
        images: how many, spread evenly over the data set.
        threshold: smallest score that is drawn. Evaluation knows no threshold.

    Returns:
        The files written.

    Raises:
        DataError: if the test set cannot be read.
        WeightsError: if the weights are missing or do not fill the whole model.
    """
    if not cfg.DATASETS.TEST:
        raise DataError(
            "DATASETS.TEST is empty, so there are no images to draw. Write a registered name, or "
            "DATASETS.CUSTOM.TEST_JSON and TEST_IMAGES."
        )
    predictor = load_predictor(cfg)
    name = cfg.DATASETS.TEST[0]
    with explain_data_errors(name):
        records = DatasetCatalog.get(name)
    classes = MetadataCatalog.get(name).thing_classes
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for index in spread(len(records), images):
        record = dict(records[index])
        image = np.ascontiguousarray(read_image(record, "BGR"))
        found = predictor(image)["instances"].to("cpu")
        picture = picture_of(image, record, found, classes, threshold)
        path = folder / f"{index:05d}_{Path(record['file_name']).stem}.png"
        cv2.imwrite(str(path), picture)
        written.append(path)
    return written


def picture_of(
    image: np.ndarray,
    record: dict[str, Any],
    found: Instances,
    classes: list[str],
    threshold: float,
) -> np.ndarray:
    """Ground truth at the left, predictions at the right.

    Args:
        image: (H, W, 3) uint8, BGR.
        record: of the image, with ``annotations``.
        found: detections in pixels of the image, on the CPU.
        classes: names.
        threshold: smallest score that is drawn.
    """
    image = np.ascontiguousarray(image)
    truth = _draw_annotations(image, record["annotations"], classes)
    found = found[found.scores >= threshold]
    prediction = draw_boxes(
        image,
        found.pred_boxes.tensor.numpy(),
        found.pred_classes.tolist(),
        classes,
        found.scores.tolist(),
    )
    titles = ["ground truth", f"prediction (score >= {threshold:g})"]
    return side_by_side([truth, prediction], titles)


def spread(total: int, count: int) -> list[int]:
    """At most `count` indices, spread evenly over `total`."""
    chosen: list[int] = np.unique(np.linspace(0, total - 1, count).round().astype(int)).tolist()
    return chosen


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


def _draw_annotations(image: np.ndarray, annotations: list[dict], names: list[str]) -> np.ndarray:
    boxes = [
        BoxMode.convert(list(a["bbox"]), a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations
    ]
    labels = [a["category_id"] for a in annotations]
    return draw_boxes(image, np.array(boxes, dtype=float).reshape(-1, 4), labels, names)
