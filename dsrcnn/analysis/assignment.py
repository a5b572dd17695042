"""One-to-one assignment and DLA of the same predictions, stage by stage."""

from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from ..modeling import SparseRCNN
from ..modeling.matching import build_matcher
from ..structures import Predictions, Targets
from ..visualization.draw import draw_assignment, hstack, vstack
from .images import as_bgr, load_predictor, require_architecture, save_image, training_images


@torch.no_grad()
def draw_assignments(cfg: CfgNode, output: str | Path, *, images: int = 4) -> list[Path]:
    """Draw the proposals that are assigned to each object of training images, at every stage.

    The upper row is Hungarian matching, the lower the matcher of ``MODEL.SparseRCNN.DLA``, used
    whether or not it is enabled. Both assign the same predictions.
    """
    require_architecture(cfg, SparseRCNN, "dsrcnn draw assignment")
    inputs = training_images(cfg, images)
    model = load_predictor(cfg).model
    matchers = {"Hungarian": _build_matcher(cfg, dla=False), "DLA": _build_matcher(cfg, dla=True)}
    files = []
    for number, record in enumerate(inputs):
        predictions, batch = model.raw_predictions([record], all_stages=True)
        targets = Targets.from_inputs([record], batch.sizes)
        image = as_bgr(record["image"], cfg.INPUT.FORMAT)
        rows = [
            _draw_stages(image, predictions, matcher(predictions, targets)[:, 0], targets, title)
            for title, matcher in matchers.items()
        ]
        name = f"{number:03d}_{Path(record['file_name']).stem}.png"
        files.append(save_image(Path(output) / name, vstack(rows)))
    return files


def _build_matcher(cfg: CfgNode, *, dla: bool) -> nn.Module:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.SparseRCNN.DLA.ENABLED = dla
    return build_matcher(cfg)


def _draw_stages(
    image: np.ndarray, predictions: Predictions, assignment: Tensor, targets: Targets, name: str
) -> np.ndarray:
    """Draw the assignment (Q, P) of the first image at all stages."""
    objects = targets.boxes[0].cpu().numpy()
    tiles, titles = [], []
    stages, boxes = predictions.stage.tolist(), predictions.boxes[:, 0].cpu()
    for stage, proposals, assigned in zip(stages, boxes, assignment.cpu(), strict=True):
        tiles.append(draw_assignment(image, objects, proposals.numpy(), assigned.numpy()))
        titles.append(f"{name}, stage {stage + 1}: {int((assigned >= 0).sum())} positives")
    return hstack(tiles, titles)
