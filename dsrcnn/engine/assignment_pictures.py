"""The same predictions assigned one-to-one and by DLA, drawn stage by stage."""

from pathlib import Path

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from torch import Tensor

from ..data.loaders import explain_data_errors
from ..data.mapper import DetectionMapper
from ..errors import DataError
from ..modeling.inputs import pad_targets
from ..modeling.matching import build_matcher
from ..structures import Predictions, Targets
from ..visualization import draw_assignment, one_below_the_other, side_by_side
from .pictures import load_predictor, spread

__all__ = ["draw_assignments"]


def draw_assignments(cfg: CfgNode, output: str | Path, *, images: int = 4) -> list[Path]:
    """Write pictures of training images: which proposals learn which object, at every stage.

    The upper row is Hungarian matching, the lower the matcher of ``MODEL.SparseRCNN.DLA``, used
    whether or not it is enabled. Both assign the same predictions.

    Args:
        cfg: with ``MODEL.WEIGHTS`` and ``DATASETS.TRAIN``.
        output: folder to write to.
        images: how many, spread evenly over the data set.

    Returns:
        The files written.

    Raises:
        DataError: if the training set cannot be read.
        WeightsError: if the weights are missing or do not fill the whole model.
    """
    if not cfg.DATASETS.TRAIN:
        raise DataError(
            "DATASETS.TRAIN is empty, so there are no images to draw. Write a registered name, or "
            "DATASETS.CUSTOM.TRAIN_JSON and TRAIN_IMAGES."
        )
    plain = _without_augmentation(cfg)
    model = load_predictor(plain).model
    model.head.train()  # only this part: it then gives the predictions of all stages
    matchers = {"Hungarian": _matcher(plain, dla=False), "DLA": _matcher(plain, dla=True)}
    name = cfg.DATASETS.TRAIN[0]
    with explain_data_errors(name):
        records = [r for r in DatasetCatalog.get(name) if r["annotations"]]
    if not records:
        raise DataError(f"No image of {name} has an annotation, so there is nothing to assign.")
    mapper = DetectionMapper(plain, is_train=True)
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for index in spread(len(records), images):
        batch = [mapper(records[index])]
        with torch.no_grad():
            predictions, sizes, _ = model.predict(batch)
        targets = pad_targets(batch, sizes)
        picture = _as_bgr(batch[0]["image"], cfg.INPUT.FORMAT)
        rows = [
            _row(picture, predictions, matcher(predictions, targets)[:, 0], targets, title)
            for title, matcher in matchers.items()
        ]
        path = folder / f"{index:05d}_{Path(records[index]['file_name']).stem}.png"
        cv2.imwrite(str(path), one_below_the_other(rows))
        written.append(path)
    return written


def _without_augmentation(cfg: CfgNode) -> CfgNode:
    plain = cfg.clone()
    plain.defrost()
    plain.INPUT.RANDOM_FLIP = "none"
    plain.INPUT.CROP.ENABLED = False
    plain.INPUT.MIN_SIZE_TRAIN_SAMPLING = "choice"
    plain.INPUT.MIN_SIZE_TRAIN = (cfg.INPUT.MIN_SIZE_TEST,)
    plain.INPUT.MAX_SIZE_TRAIN = cfg.INPUT.MAX_SIZE_TEST
    return plain


def _matcher(cfg: CfgNode, *, dla: bool) -> torch.nn.Module:
    chosen = cfg.clone()
    chosen.defrost()
    chosen.MODEL.SparseRCNN.DLA.ENABLED = dla
    return build_matcher(chosen)


def _as_bgr(image: Tensor, order: str) -> np.ndarray:
    array = image.permute(1, 2, 0).byte().numpy()
    return np.ascontiguousarray(array[..., ::-1] if order == "RGB" else array)


def _row(
    picture: np.ndarray, predictions: Predictions, assignment: Tensor, targets: Targets, name: str
) -> np.ndarray:
    """One matcher at all stages, for the first image; assignment (Q, P)."""
    objects = targets.boxes[0].cpu().numpy()
    tiles, titles = [], []
    stages, boxes = predictions.stage.tolist(), predictions.boxes[:, 0].cpu()
    for stage, proposals, learned in zip(stages, boxes, assignment.cpu(), strict=True):
        tiles.append(draw_assignment(picture, objects, proposals.numpy(), learned.numpy()))
        titles.append(f"{name}, stage {stage + 1}: {int((learned >= 0).sum())} positives")
    return side_by_side(tiles, titles)
