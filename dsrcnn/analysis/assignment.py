"""One-to-one assignment and DLA of the same predictions, stage by stage."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from torch import nn

from ..modeling import SparseRCNN
from ..modeling.matching import build_matcher
from ..structures import Targets
from ..visualization.draw import draw_assignment, hstack, vstack
from .images import as_bgr, load_predictor, require_architecture, save_image, training_images

MATCHERS = ("Hungarian", "DLA")


@dataclass(frozen=True)
class Assignments:
    """Assignments of the predictions for one image, by several matchers.

    Notation: Q sets of predictions (stages, and routes of SQR), P proposals, M objects.

    Attributes:
        image: model input (H, W, 3) uint8 BGR.
        objects: (M, 4) ground truth, xyxy in pixels of `image`.
        boxes: (Q, P, 4) predicted boxes.
        stages: (Q,) stage of each set, from 0.
        assigned: by matcher, (Q, P) index of the object of every proposal, -1 for background.
    """

    image: np.ndarray
    objects: np.ndarray
    boxes: np.ndarray
    stages: list[int]
    assigned: dict[str, np.ndarray]

    def positives(self, matcher: str, index: int) -> int:
        """Return the number of proposals of a set that are assigned to objects."""
        return int((self.assigned[matcher][index] >= 0).sum())

    def draw(self, matcher: str, index: int, *, min_side: int = 240) -> np.ndarray:
        """Draw the objects and the proposals that are assigned to them in a set."""
        parts = self.boxes[index], self.assigned[matcher][index]
        return draw_assignment(self.image, self.objects, *parts, min_side=min_side)

    def draw_all(self) -> np.ndarray:
        """Draw a row of all stages for each matcher."""
        rows = []
        for matcher in self.assigned:
            sets = range(len(self.stages))
            titles = [
                f"{matcher}, stage {self.stages[i] + 1}: {self.positives(matcher, i)} positives"
                for i in sets
            ]
            rows.append(hstack([self.draw(matcher, i) for i in sets], titles))
        return vstack(rows)


@torch.no_grad()
def compare_assignments(
    model: SparseRCNN, cfg: CfgNode, inputs: list[dict[str, Any]]
) -> Iterator[Assignments]:
    """Assign the predictions for images by Hungarian matching and by ``MODEL.SparseRCNN.DLA``.

    Both are used, whether or not DLA is enabled.

    Args:
        model: in evaluation mode.
        cfg: its config.
        inputs: model inputs with ``instances``, the ground truth.
    """
    matchers = {name: _build_matcher(cfg, dla=name == "DLA") for name in MATCHERS}
    for record in inputs:
        predictions, batch = model.raw_predictions([record], all_stages=True)
        targets = Targets.from_inputs([record], batch.sizes)
        yield Assignments(
            image=as_bgr(record["image"], cfg.INPUT.FORMAT),
            objects=targets.boxes[0].cpu().numpy(),
            boxes=predictions.boxes[:, 0].cpu().numpy(),
            stages=predictions.stage.tolist(),
            assigned={
                name: matcher(predictions, targets)[:, 0].cpu().numpy()
                for name, matcher in matchers.items()
            },
        )


def draw_assignments(cfg: CfgNode, output: str | Path, *, images: int = 4) -> list[Path]:
    """Draw the proposals that are assigned to each object of training images, at every stage.

    The upper row is Hungarian matching, the lower the matcher of ``MODEL.SparseRCNN.DLA``, used
    whether or not it is enabled. Both assign the same predictions.
    """
    require_architecture(cfg, SparseRCNN, "dsrcnn draw assignment")
    inputs = training_images(cfg, images)
    model = load_predictor(cfg).model
    files = []
    results = compare_assignments(model, cfg, inputs)
    for number, (record, result) in enumerate(zip(inputs, results, strict=True)):
        name = f"{number:03d}_{Path(record['file_name']).stem}.png"
        files.append(save_image(Path(output) / name, result.draw_all()))
    return files


def _build_matcher(cfg: CfgNode, *, dla: bool) -> nn.Module:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.SparseRCNN.DLA.ENABLED = dla
    return build_matcher(cfg)
