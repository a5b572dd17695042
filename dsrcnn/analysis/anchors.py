"""Anchors of ASAG by pyramid level, with the patches it probed."""

from pathlib import Path
from typing import cast

import numpy as np
import torch
from detectron2.config import CfgNode

from ..modeling import ASAG
from ..modeling.asag.anchor_generator import Anchors, ProbedLevel
from ..modeling.asag.patches import CELLS
from ..structures import box_cxcywh_to_xyxy
from ..visualization.draw import draw_anchors, hstack, vstack
from .images import (
    Report,
    as_bgr,
    load_predictor,
    require_architecture,
    save_image,
    training_images,
)


@torch.no_grad()
def draw_generated_anchors(cfg: CfgNode, output: str | Path, *, images: int = 4) -> Report:
    """Write ``anchors.png``: a row for each training image, anchors of P6 and P5, of P4, of P3.

    Probed patches are drawn around the anchors predicted on them. Statistics are the numbers of
    anchors and of patches of each probed level.
    """
    require_architecture(cfg, ASAG, "dsrcnn draw anchors")
    inputs = training_images(cfg, images)
    model = cast(ASAG, load_predictor(cfg).model)
    rows, counts = [], []
    for record in inputs:
        batch = model.preprocess_image([record])
        anchors, probed = model.anchors(model.extract_features(batch), batch.sizes)
        image = as_bgr(record["image"], cfg.INPUT.FORMAT)
        rows.append(_draw_levels(image, anchors, probed))
        patches = {level.stride: len(level.images) for level in probed}
        counts.append([anchors.boxes.shape[1], patches.get(16, 0), patches.get(8, 0)])
    file = save_image(Path(output) / "anchors.png", vstack(rows))
    names, means = ("anchors", "patches of P4", "patches of P3"), np.mean(counts, axis=0).tolist()
    return Report([file], dict(zip(names, means, strict=True)))


def _draw_levels(image: np.ndarray, anchors: Anchors, probed: list[ProbedLevel]) -> np.ndarray:
    """Draw the anchors of one image by level; titles say which levels were not probed."""
    boxes = box_cxcywh_to_xyxy(anchors.boxes[0]).cpu().numpy()
    scores, levels = anchors.scores[0].cpu().numpy(), anchors.level[0].cpu().numpy()
    positions = {level.stride: level.positions.cpu().numpy() for level in probed}
    tiles, titles = [], []
    for level, name in ((5, "P6, P5"), (4, "P4"), (3, "P3")):
        stride, at_level = 2**level, levels == level
        corners = positions.get(stride, np.zeros((0, 2))) * stride
        patches = np.concatenate([corners, corners + CELLS * stride], axis=1)
        tiles.append(draw_anchors(image, boxes[at_level], scores[at_level], patches))
        titles.append(f"{name}: {at_level.sum()} anchors")
        if level < 5:
            count = f", {len(patches)} patch{'' if len(patches) == 1 else 'es'}"
            titles[-1] += count if stride in positions else " (not probed)"
    return hstack(tiles, titles)
