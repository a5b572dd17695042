"""Initial proposals that DPG mixes for each image, and the weights of its experts."""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from detectron2.config import CfgNode
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from ..errors import ConfigError, DataError
from ..modeling import SparseRCNN
from ..modeling.proposals import DynamicProposals
from ..modeling.proposals.dynamic import mixture_statistics
from ..structures import box_cxcywh_to_xyxy
from ..visualization.curves import draw_curves
from ..visualization.draw import draw_proposals, hstack, vstack
from ..visualization.fonts import plot_labels
from ..visualization.report_plots import plain_text
from .images import (
    Report,
    as_bgr,
    load_predictor,
    require_architecture,
    save_image,
    training_images,
)
from .mixtures import annotated_test_images, draw_permutation_test, permutation_test


@torch.no_grad()
def draw_initial_proposals(
    cfg: CfgNode,
    output: str | Path,
    *,
    images: int = 4,
    permutations: int = 0,
    num_images: int = 100,
) -> Report:
    """Write ``proposals.png`` and ``weights.png`` for images of the training set.

    The first shows the proposals DPG mixes for each image, and below them the mean of the experts;
    the second shows the weights. With ``metrics.json`` in ``OUTPUT_DIR`` there is also
    ``curves.png``: temperature, entropy and variation over training. Statistics are those of
    `mixture_statistics`.

    With `permutations`, ``permutations.png`` and further statistics compare the loss of
    `num_images` test images with their own mixtures to that with mixtures of other images, see
    `permutation_test`.
    """
    require_architecture(cfg, SparseRCNN, "The drawing of mixtures")
    if not cfg.MODEL.SparseRCNN.DPG.ENABLED:
        raise ConfigError(
            "MODEL.SparseRCNN.DPG.ENABLED is False, so this model has no mixtures of proposals to "
            "draw. Take a config with DPG."
        )
    inputs = training_images(cfg, images)
    model = cast(SparseRCNN, load_predictor(cfg).model)
    dpg = cast(DynamicProposals, model.proposals)
    weights = mixing_weights(model, inputs)
    mixed = dpg.mix(weights)[0]
    mean = dpg.expert_boxes.mean(dim=0).expand_as(mixed)
    names = [Path(record["file_name"]).stem for record in inputs]
    pictures = [as_bgr(record["image"], cfg.INPUT.FORMAT) for record in inputs]
    rows = [
        hstack(
            [_draw_boxes(image, of_image) for image, of_image in zip(pictures, boxes, strict=True)],
            [f"{kind}: {name}" for name in names],
        )
        for kind, boxes in (("DPG", mixed), ("mean of experts", mean))
    ]
    folder = Path(output)
    heat_maps = draw_expert_weights(weights.cpu().numpy(), names)
    sheets = {"proposals.png": vstack(rows), "weights.png": heat_maps}
    files = [save_image(folder / name, sheet) for name, sheet in sheets.items()]
    metrics = Path(cfg.OUTPUT_DIR) / "metrics.json"
    if metrics.is_file():
        with suppress(DataError):  # of a run that was cut off at its start
            draw_curves(metrics, folder / "curves.png")
            files.append(folder / "curves.png")
    statistics = {k: v.item() for k, v in mixture_statistics(weights, mixed).items()}
    if permutations:
        test_set = annotated_test_images(cfg, num_images)
        test = permutation_test(model, test_set, permutations=permutations)
        files.append(draw_permutation_test(test, folder / "permutations.png"))
        statistics |= test.statistics()
    return Report(files, statistics)


@torch.no_grad()
def mixing_weights(model: SparseRCNN, inputs: Iterable[dict[str, Any]]) -> Tensor:
    """Compute the weights (B, E, P) of the experts of a model with DPG for images, one by one."""
    dpg, weights = cast(DynamicProposals, model.proposals), []
    for record in inputs:
        images = model.preprocess_image([record])
        logits = dpg.logits(model.extract_features(images), images.sizes)
        weights.append(dpg.mixing_weights(logits))
    return torch.cat(weights)


def _draw_boxes(image: np.ndarray, boxes: Tensor) -> np.ndarray:
    """Draw boxes (P, 4), center and size as fractions of the image."""
    size = boxes.new_tensor(image.shape[1::-1]).repeat(2)
    return draw_proposals(image, (box_cxcywh_to_xyxy(boxes) * size).cpu().numpy())


def draw_expert_weights(weights: np.ndarray, titles: list[str]) -> np.ndarray:
    """Draw weights (B, E, P) in 0..1 as a BGR heat map per image; rows are experts."""
    images = len(weights)
    figure = Figure(figsize=(9, 0.5 + 1.3 * images), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(images, 1, squeeze=False)[:, 0]
    texts, families = plot_labels(tuple(titles), "image")
    for axes, values, title in zip(panels, weights, texts, strict=True):
        heat_map = axes.imshow(values, aspect="auto", vmin=0, vmax=1, cmap="viridis")
        axes.set_title(plain_text(title), fontsize=9, fontfamily=families)
        axes.set_ylabel("expert")
        axes.set_yticks(range(values.shape[0]))
    axes.set_xlabel("proposal")
    figure.colorbar(heat_map, ax=figure.axes, label="weight")
    canvas.draw()
    return np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., 2::-1])
