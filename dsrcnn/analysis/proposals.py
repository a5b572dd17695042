"""Heat maps of expert weights."""

from pathlib import Path
from typing import NamedTuple, cast

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from ..errors import ConfigError
from ..modeling import SparseRCNN
from ..modeling.proposals import DynamicProposals
from ..modeling.proposals.dynamic import mixing_statistics
from ..structures import box_cxcywh_to_xyxy
from ..visualization import draw_curves, draw_proposals, one_below_the_other, side_by_side
from .images import as_bgr, load_predictor, training_images

__all__ = ["MixtureReport", "draw_expert_weights", "draw_initial_proposals"]


def draw_expert_weights(weights: np.ndarray, titles: list[str]) -> np.ndarray:
    """Heat maps, one per image: experts downwards, proposals to the right.

    Args:
        weights: (B, E, P) in 0..1.
        titles: B names of images.

    Returns:
        The picture, BGR.
    """
    images = len(weights)
    figure = Figure(figsize=(9, 0.5 + 1.3 * images), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for axes, values, title in zip(
        figure.subplots(images, 1, squeeze=False)[:, 0], weights, titles, strict=True
    ):
        shown = axes.imshow(values, aspect="auto", vmin=0, vmax=1, cmap="viridis")
        axes.set_title(title, fontsize=9)
        axes.set_ylabel("expert")
        axes.set_yticks(range(values.shape[0]))
    axes.set_xlabel("proposal")
    figure.colorbar(shown, ax=figure.axes, label="weight")
    canvas.draw()
    return np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., 2::-1])


class MixtureReport(NamedTuple):
    """What was drawn, and numbers about it.

    Attributes:
        files: the pictures.
        statistics: of `mixing_statistics`, over the images drawn.
    """

    files: list[Path]
    statistics: dict[str, float]


@torch.no_grad()
def draw_initial_proposals(cfg: CfgNode, output: str | Path, *, images: int = 4) -> MixtureReport:
    """Write ``proposals.png`` and ``weights.png`` for images of the training set.

    The first has a row of images with the proposals DPG mixes for each, and below them the mean of
    the experts. The second shows the weights. With the ``metrics.json`` of a run in ``OUTPUT_DIR``
    there is also ``curves.png``: temperature, entropy and variation over training.

    Args:
        cfg: with ``MODEL.WEIGHTS``, ``DATASETS.TRAIN`` and DPG enabled.
        output: folder to write to.
        images: how many, spread evenly over the data set.

    Raises:
        ConfigError: if the model has no DPG.
        DataError: if the training set cannot be read.
        WeightsError: if the weights are missing or do not fill the whole model.
    """
    if not cfg.MODEL.SparseRCNN.DPG.ENABLED:
        raise ConfigError(
            "MODEL.SparseRCNN.DPG.ENABLED is False: this model starts every image from the same "
            "proposals. Take a config with DPG."
        )
    inputs = training_images(cfg, images)
    model = cast(SparseRCNN, load_predictor(cfg).model)
    dpg = cast(DynamicProposals, model.proposals)
    weights = torch.cat([dpg.weights(*model.extract([record])[:2]) for record in inputs])
    mixed = dpg.mix(weights)[0]
    mean = dpg.expert_boxes.mean(dim=0).expand_as(mixed)
    names = [Path(record["file_name"]).stem for record in inputs]
    pictures = [as_bgr(record["image"], cfg.INPUT.FORMAT) for record in inputs]
    rows = [
        side_by_side(
            [_draw(picture, boxes) for picture, boxes in zip(pictures, boxes_unit, strict=True)],
            [f"{kind}: {name}" for name in names],
        )
        for kind, boxes_unit in (("DPG", mixed), ("mean of experts", mean))
    ]
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "proposals.png", folder / "weights.png"]
    metrics = Path(cfg.OUTPUT_DIR) / "metrics.json"
    if metrics.is_file():
        files.append(folder / "curves.png")
        draw_curves(metrics, files[-1])
    cv2.imwrite(str(files[0]), one_below_the_other(rows))
    cv2.imwrite(str(files[1]), draw_expert_weights(weights.cpu().numpy(), names))
    found = {name: value.item() for name, value in mixing_statistics(weights).items()}
    return MixtureReport(files, found)


def _draw(picture: np.ndarray, boxes_unit: Tensor) -> np.ndarray:
    """Boxes (P, 4), centre and size as fractions, on their picture."""
    size = boxes_unit.new_tensor(picture.shape[1::-1]).repeat(2)
    return draw_proposals(picture, (box_cxcywh_to_xyxy(boxes_unit) * size).cpu().numpy())
