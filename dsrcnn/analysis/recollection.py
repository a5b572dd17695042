"""Pictures of recollection (SQR): routes through the cascade, and objects that it loses again."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from ..data.build import explain_data_errors
from ..data.mapper import DetectionMapper
from ..errors import ConfigError, DataError
from ..evaluation.duplicates import found_objects
from ..modeling.decoder.sqr import build_windows, routes_of
from ..modeling.postprocessing import select_detections
from ..visualization import draw_boxes, side_by_side
from ..visualization.draw import spread
from .images import as_bgr, expect_cascade, load_predictor, predict_at_every_stage

__all__ = [
    "RecollectionReport",
    "draw_found_by_stage",
    "draw_recollection",
    "draw_routes",
    "route_dots",
    "route_line",
]

_Dot = tuple[float, float]  # stage and height
_BENDS = (0.25, -0.25, 0.125, -0.125, 0.4, -0.4)  # heights at mid-line; dots are 1 apart


def draw_routes(
    routes: Sequence[Sequence[tuple[int, ...]]], output: str | Path, *, title: str = ""
) -> None:
    """Draw every group of proposals as a dot, joined with the group it was refined from.

    Args:
        routes: for each stage the stages that each of its groups went through, itself last.
        output: file to write.
        title: above it.
    """
    figure = Figure(figsize=(2 + 1.4 * len(routes), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    dots = route_dots(routes)
    for route, dot in dots.items():
        plain = route == tuple(range(1, len(route) + 1))
        colour = "tab:blue" if plain else "tab:gray"
        width, order = (2.5, 3) if plain else (0.7, 1)
        if route:
            line = route_line(dots, dots[route[:-1]], dot)
            axes.plot(line[:, 0], line[:, 1], color=colour, linewidth=width, zorder=order)
        axes.plot(*dot, "o", color=colour, markersize=5, zorder=order)
    ticks = [f"stage {i}\n{len(r)}" for i, r in enumerate(routes, start=1)]
    axes.set_xticks(range(len(routes) + 1), ["initial\n1", *ticks])
    axes.set_yticks([])
    axes.set_title(title)
    axes.set_xlabel(
        "groups that each stage refines; blue: the plain cascade, all that inference runs"
    )
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(output, dpi=110)


def route_dots(routes: Sequence[Sequence[tuple[int, ...]]]) -> dict[tuple[int, ...], _Dot]:
    """Where the group of every route is drawn: its stage, and its place among those of the stage.

    The plain cascade, the last group of every stage, is the line at the bottom.
    """
    dots: dict[tuple[int, ...], _Dot] = {(): (0.0, 0.0)}
    for stage, of_stage in enumerate(routes, start=1):
        for place, route in enumerate(reversed(of_stage)):
            dots[route] = (float(stage), float(place))
    return dots


def route_line(dots: Mapping[tuple[int, ...], _Dot], start: _Dot, end: _Dot) -> np.ndarray:
    """A line between two dots, bent so that it keeps clear of the dots of stages it skips.

    Returns:
        Points (K, 2) of the line.
    """
    steps = np.linspace(0, 1, 8 * round(end[0] - start[0]) + 1)[:, None]
    straight = (1 - steps) * np.array(start) + steps * np.array(end)
    arc = 4 * steps * (1 - steps) * np.array([0.0, 1.0])
    skipped = np.array([d for d in dots.values() if start[0] < d[0] < end[0]])
    if not len(skipped):
        return straight
    lines = [straight + bend * arc for bend in _BENDS]
    return max(lines, key=lambda line: np.linalg.norm(line[:, None] - skipped, axis=2).min())


def draw_found_by_stage(found: Sequence[int], lost: Sequence[int], output: str | Path) -> None:
    """Draw how many objects each stage finds, and how many of these the last stage has lost.

    Args:
        found: for each stage.
        lost: likewise, 0 for the last.
        output: file to write.
    """
    figure = Figure(figsize=(2 + len(found), 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    stages = range(1, len(found) + 1)
    kept = [a - b for a, b in zip(found, lost, strict=True)]
    axes.bar(stages, kept, color="tab:blue", label="found, and by the last stage as well")
    axes.bar(stages, lost, bottom=kept, color="tab:red", label="found, but lost by the last stage")
    for stage, total, gone in zip(stages, found, lost, strict=True):
        text = f"{gone} of {total}" if gone else str(total)
        axes.text(stage, total, text, ha="center", va="bottom")
    axes.set_xticks(list(stages))
    axes.set_xlabel("stage")
    axes.set_ylabel("objects found")
    axes.set_ylim(0, 1.15 * max(1, *found))  # space for the numbers; a bar of 0 would take it away
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=2, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(output, dpi=110)


class RecollectionReport(NamedTuple):
    """What was written and counted.

    Attributes:
        files: pictures.
        objects: in the images that were looked at.
        found: objects found by each stage.
        lost: of these, objects that the last stage does not find.
    """

    files: list[Path]
    objects: int
    found: list[int]
    lost: list[int]


class _Seen(NamedTuple):
    """Detections of all stages on one image, and which objects (S, M) each stage finds."""

    picture: np.ndarray
    boxes: list[Tensor]
    labels: list[Tensor]
    scores: list[Tensor]
    objects: Tensor
    classes: Tensor
    found: Tensor


def draw_recollection(
    cfg: CfgNode,
    output: str | Path,
    *,
    images: int = 4,
    looked_at: int = 100,
    threshold: float = 0.3,
) -> RecollectionReport:
    """Write ``routes.png``, ``found_by_stage.png``, and images with objects that were lost.

    Any cascade will do. Routes are those of `MODEL.SparseRCNN.SQR`, also where it is switched off.

    An object is found by a stage if one of its detections is of the object's class, overlaps it by
    an IoU of 0.5 and has at least the threshold's score.

    Args:
        cfg: with ``MODEL.WEIGHTS`` and ``DATASETS.TEST``.
        output: folder to write to.
        images: pictures of images, those with most objects lost.
        looked_at: images of the test set that are counted, spread evenly.
        threshold: smallest score that counts.

    Raises:
        ConfigError: if the model is no cascade whose stages can be compared.
        DataError: if the test set cannot be read.
        WeightsError: if the weights are missing or do not fill the whole model.
    """
    expect_cascade(cfg, "dsrcnn recollection")
    if not cfg.MODEL.SparseRCNN.DEEP_SUPERVISION:
        raise ConfigError(
            "MODEL.SparseRCNN.DEEP_SUPERVISION is False: only the last stage of this model "
            "predicts, and there is nothing to compare. Write True and train again."
        )
    if cfg.MODEL.SparseRCNN.NUM_HEADS < 2:
        raise ConfigError(
            "MODEL.SparseRCNN.NUM_HEADS is 1: there is no earlier stage to compare the last one "
            "with. Use it with a model of at least 2 stages."
        )
    if not cfg.DATASETS.TEST:
        raise DataError("DATASETS.TEST is empty, so there are no images to look at.")
    name = cfg.DATASETS.TEST[0]
    with explain_data_errors(name):
        records = DatasetCatalog.get(name)
    model = load_predictor(cfg).model
    predict_at_every_stage(model)
    mapper = DetectionMapper(cfg, is_train=False, keep_annotations=True)
    seen = [
        _look(model, mapper(records[index]), threshold, cfg.INPUT.FORMAT)
        for index in tqdm(spread(len(records), looked_at), desc="looking")
    ]
    found = torch.cat([s.found for s in seen], dim=1)
    lost = found & ~found[-1]
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "routes.png", folder / "found_by_stage.png"]
    is_on = cfg.MODEL.SparseRCNN.SQR.ENABLED
    title = "" if is_on else "as they would be: MODEL.SparseRCNN.SQR is off"
    draw_routes(routes_of(build_windows(cfg)), files[0], title=title)
    counts = found.sum(dim=1).tolist(), lost.sum(dim=1).tolist()
    draw_found_by_stage(*counts, files[1])
    names = MetadataCatalog.get(name).thing_classes
    worst = sorted(seen, key=lambda s: int((s.found[:-1].any(dim=0) & ~s.found[-1]).sum()))
    for number, image in enumerate(worst[: -images - 1 : -1]):
        files.append(folder / f"lost_{number:02d}.png")
        cv2.imwrite(str(files[-1]), _picture(image, names))
    return RecollectionReport(files, found.shape[1], *counts)


@torch.no_grad()
def _look(model: Any, record: dict[str, Any], threshold: float, order: str) -> _Seen:
    """Run the plain cascade on one image."""
    predictions, sizes, _ = model.predict([record])
    found = select_detections(
        predictions.logits[:, 0],
        predictions.boxes[:, 0],
        limit=model.detections_per_image,
        focal=model.focal,
        nms_threshold=model.nms_threshold,
        nms_class_wise=model.nms_class_wise,
        sizes=sizes.expand(len(predictions.stage), 4),
    )
    good = (found.kept & (found.scores >= threshold)).cpu()
    parts = [
        [x[stage].cpu()[good[stage]] for stage in range(len(predictions.stage))]
        for x in (found.boxes, found.classes, found.scores)
    ]
    instances = record["instances"]
    objects, classes = instances.gt_boxes.tensor, instances.gt_classes
    matched = torch.stack(
        [found_objects(b, c, objects, classes) for b, c in zip(parts[0], parts[1], strict=True)]
    )
    picture = as_bgr(record["image"], order)
    return _Seen(picture, parts[0], parts[1], parts[2], objects, classes, matched)


def stage_that_had_most(lost: Tensor) -> int:
    """Which stage found most of the lost objects (S - 1, M), counted from 0.

    Of several it is the latest: the first stage, which covers images evenly, hits some by chance.
    """
    return len(lost) - 1 - int(lost.sum(dim=1).flip(0).argmax())


def _picture(seen: _Seen, names: list[str]) -> np.ndarray:
    """Lost objects, the detections of the stage that found most of them, and those of the last."""
    lost = seen.found[:-1] & ~seen.found[-1]
    best = stage_that_had_most(lost)
    chosen = lost[best] if lost.any() else torch.zeros(len(seen.objects), dtype=torch.bool)
    pictures = [
        draw_boxes(seen.picture, seen.objects[chosen].numpy(), seen.classes[chosen].tolist(), names)
    ]
    titles = [f"found by stage {best + 1}, lost: {int(chosen.sum())}"]
    for stage in (best, len(seen.boxes) - 1):
        boxes, labels = seen.boxes[stage].numpy(), seen.labels[stage].tolist()
        pictures.append(draw_boxes(seen.picture, boxes, labels, names, seen.scores[stage].tolist()))
        titles.append(f"stage {stage + 1}")
    return side_by_side(pictures, titles)
