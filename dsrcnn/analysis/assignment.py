"""The same predictions assigned one-to-one and by DLA, drawn stage by stage."""

from pathlib import Path

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from torch import Tensor

from ..modeling.matching import build_matcher
from ..modeling.meta_arch.base import pad_targets
from ..structures import Predictions, Targets
from ..visualization import draw_assignment, one_below_the_other, side_by_side
from .images import as_bgr, expect_cascade, load_predictor, predict_at_every_stage, training_images

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
    expect_cascade(cfg, "dsrcnn assignment")
    inputs = training_images(cfg, images)
    model = load_predictor(cfg).model
    predict_at_every_stage(model)
    matchers = {"Hungarian": _matcher(cfg, dla=False), "DLA": _matcher(cfg, dla=True)}
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for number, record in enumerate(inputs):
        batch = [record]
        with torch.no_grad():
            predictions, sizes, _ = model.predict(batch)
        targets = pad_targets(batch, sizes)
        picture = as_bgr(record["image"], cfg.INPUT.FORMAT)
        rows = [
            _row(picture, predictions, matcher(predictions, targets)[:, 0], targets, title)
            for title, matcher in matchers.items()
        ]
        path = folder / f"{number:03d}_{Path(record['file_name']).stem}.png"
        cv2.imwrite(str(path), one_below_the_other(rows))
        written.append(path)
    return written


def _matcher(cfg: CfgNode, *, dla: bool) -> torch.nn.Module:
    chosen = cfg.clone()
    chosen.defrost()
    chosen.MODEL.SparseRCNN.DLA.ENABLED = dla
    return build_matcher(chosen)


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
