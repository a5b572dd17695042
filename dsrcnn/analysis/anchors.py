"""What ASAG looks at: anchors by level, and where it looked more closely."""

from pathlib import Path
from typing import NamedTuple, cast

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode

from ..errors import ConfigError
from ..modeling import ASAG
from ..modeling.asag import Anchors, ProbedLevel
from ..structures import box_cxcywh_to_xyxy
from ..visualization import draw_anchors, one_below_the_other, side_by_side
from .images import as_bgr, load_predictor, training_images

__all__ = ["AnchorReport", "draw_generated_anchors"]


class AnchorReport(NamedTuple):
    """What was drawn, and numbers about it.

    Attributes:
        file: the picture.
        statistics: anchors, and patches of the probed levels: means over the images drawn.
    """

    file: Path
    statistics: dict[str, float]


@torch.no_grad()
def draw_generated_anchors(cfg: CfgNode, output: str | Path, *, images: int = 4) -> AnchorReport:
    """Write ``anchors.png``: for images of the training set, anchors of each level by themselves.

    Patches that were probed are drawn around the anchors found on them; the title of a level that
    was not probed says so.

    Args:
        cfg: of an ASAG, with ``MODEL.WEIGHTS`` and ``DATASETS.TRAIN``.
        output: folder to write to.
        images: how many, spread evenly over the data set.

    Raises:
        ConfigError: if the architecture is another.
        DataError: if the training set cannot be read.
        WeightsError: if the weights are missing or do not fill the whole model.
    """
    if cfg.MODEL.META_ARCHITECTURE != "ASAG":
        raise ConfigError(
            f"anchors draws what ASAG generates, and MODEL.META_ARCHITECTURE "
            f"{cfg.MODEL.META_ARCHITECTURE} generates none. Use it with a config of ASAG."
        )
    inputs = training_images(cfg, images)
    model = cast(ASAG, load_predictor(cfg).model)
    rows, counts = [], []
    for record in inputs:
        anchors, probed = model.anchors(*model.extract([record])[:2])
        picture = as_bgr(record["image"], cfg.INPUT.FORMAT)
        rows.append(_row(picture, anchors, probed, model.generator.cells))
        patches = {level.stride: len(level.images) for level in probed}
        counts.append([anchors.boxes.shape[1], patches.get(16, 0), patches.get(8, 0)])
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(folder / "anchors.png"), one_below_the_other(rows))
    names = ("anchors", "patches of P4", "patches of P3")
    means = np.mean(counts, axis=0).tolist()
    return AnchorReport(folder / "anchors.png", dict(zip(names, means, strict=True)))


def _row(
    picture: np.ndarray, anchors: Anchors, probed: list[ProbedLevel], cells: int
) -> np.ndarray:
    """One image three times: anchors of P6 and P5, of P4 and of P3."""
    boxes = box_cxcywh_to_xyxy(anchors.boxes[0]).cpu().numpy()
    scores, levels = anchors.scores[0].cpu().numpy(), anchors.level[0].cpu().numpy()
    places = {level.stride: level.positions.cpu().numpy() for level in probed}
    panels, titles = [], []
    for level, name in ((5, "P6, P5"), (4, "P4"), (3, "P3")):
        stride = 2**level
        own = levels == level
        corners = places.get(stride, np.zeros((0, 2))) * stride
        patches = np.concatenate([corners, corners + cells * stride], axis=1)
        panels.append(draw_anchors(picture, boxes[own], scores[own], patches))
        title = f"{name}: {own.sum()} anchors"
        if level < 5:
            count = f"{len(patches)} patch{'' if len(patches) == 1 else 'es'}"
            title += f", {count}" if stride in places else " (not probed)"
        titles.append(title)
    return side_by_side(panels, titles)
