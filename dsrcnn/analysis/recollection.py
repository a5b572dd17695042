"""Routes of recollection (SQR) through the cascade, and objects that later stages lose."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from detectron2.config import CfgNode
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.ops import box_iou

from ..data.mapper import DetectionMapper
from ..engine.console import progress_bar
from ..errors import ConfigError
from ..modeling import SparseRCNN
from ..modeling.decoder.sqr import build_windows, routes_of
from ..modeling.postprocessing import select_detections
from ..visualization.draw import draw_boxes, evenly_spaced, hstack
from .images import as_bgr, load_predictor, load_records, require_architecture, save_image

_Route = tuple[int, ...]  # stages of a group, counted from 1
_Dot = tuple[float, float]  # stage and height
_BENDS = (0.25, -0.25, 0.125, -0.125, 0.4, -0.4)  # heights at mid-line; dots are 1 apart


class RecollectionReport(NamedTuple):
    """Pictures, number of objects, and objects by stage: detected, and lost by the last stage."""

    files: list[Path]
    objects: int
    detected: list[int]
    lost: list[int]


class _StageDetections(NamedTuple):
    """Detections of all stages on one image.

    Attributes:
        image: (H, W, 3) BGR.
        stages: boxes (K, 4), labels (K,) and scores (K,) of each stage.
        objects: (M, 4) ground truth.
        classes: (M,) of the objects.
        matched: (S, M) bool, True for objects that a stage detects.
    """

    image: np.ndarray
    stages: list[tuple[Tensor, Tensor, Tensor]]
    objects: Tensor
    classes: Tensor
    matched: Tensor

    def lost(self) -> Tensor:
        """Return (S - 1, M) bool, True for objects that a stage detects and the last does not."""
        return self.matched[:-1] & ~self.matched[-1]


def draw_recollection(
    cfg: CfgNode,
    output: str | Path,
    *,
    images: int = 4,
    num_images: int = 100,
    threshold: float = 0.3,
) -> RecollectionReport:
    """Write ``routes.png``, ``found_by_stage.png``, and images with lost objects.

    Routes are those of ``MODEL.SparseRCNN.SQR``, also if it is disabled. A stage detects an object
    if one of its detections has the object's class, an IoU of at least 0.5 with it and a score of
    at least `threshold`.

    Objects are counted in `num_images` images, evenly spaced over the test set. The `images` with
    most lost objects are drawn.
    """
    require_architecture(cfg, SparseRCNN, "dsrcnn draw recollection")
    node = cfg.MODEL.SparseRCNN
    if not node.DEEP_SUPERVISION:
        raise ConfigError(
            "MODEL.SparseRCNN.DEEP_SUPERVISION is False: only the last stage of this model "
            "predicts, and there is nothing to compare. Write True and train again."
        )
    if node.NUM_HEADS < 2:
        raise ConfigError(
            "MODEL.SparseRCNN.NUM_HEADS is 1: there is no earlier stage to compare the last one "
            "with. Use it with a model of at least 2 stages."
        )
    records, names = load_records(cfg, "TEST")
    model = cast(SparseRCNN, load_predictor(cfg).model)
    mapper = DetectionMapper(cfg, is_train=False, keep_annotations=True)
    results = [
        _detect(model, mapper(records[index]), threshold, cfg.INPUT.FORMAT)
        for index in progress_bar(evenly_spaced(len(records), num_images), desc="images")
    ]
    matched = torch.cat([r.matched for r in results], dim=1)
    detected = matched.sum(dim=1).tolist()
    lost = (matched & ~matched[-1]).sum(dim=1).tolist()
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "routes.png", folder / "found_by_stage.png"]
    title = "" if node.SQR.ENABLED else "as they would be: MODEL.SparseRCNN.SQR is off"
    _draw_routes(routes_of(build_windows(cfg)), title, files[0])
    _draw_counts(detected, lost, files[1])
    results.sort(key=lambda r: int(r.lost().any(dim=0).sum()))
    for number, result in enumerate(results[: -images - 1 : -1]):
        files.append(save_image(folder / f"lost_{number:02d}.png", _draw_lost(result, names)))
    return RecollectionReport(files, matched.shape[1], detected, lost)


@torch.no_grad()
def _detect(
    model: SparseRCNN, record: dict[str, Any], threshold: float, order: str
) -> _StageDetections:
    """Run the plain cascade on one image and match the detections of every stage."""
    predictions, images = model.raw_predictions([record], all_stages=True)
    sizes = images.sizes.expand(len(predictions.stage), 4)
    of_stages = predictions.logits[:, 0], predictions.boxes[:, 0]
    detections = select_detections(*of_stages, model.detection, sizes=sizes)
    kept = detections.kept & (detections.scores >= threshold)
    by_stage = zip(detections.boxes, detections.classes, detections.scores, kept, strict=True)
    stages = [(b[keep].cpu(), c[keep].cpu(), s[keep].cpu()) for b, c, s, keep in by_stage]
    objects, classes = record["instances"].gt_boxes.tensor, record["instances"].gt_classes
    matched = [match_objects(boxes, labels, objects, classes) for boxes, labels, _ in stages]
    image = as_bgr(record["image"], order)
    return _StageDetections(image, stages, objects, classes, torch.stack(matched))


def match_objects(boxes: Tensor, labels: Tensor, objects: Tensor, classes: Tensor) -> Tensor:
    """Match detections with objects as COCO does: by score, each with its best free object.

    Args:
        boxes: (K, 4) xyxy detections, highest score first.
        labels: (K,) their classes.
        objects: (M, 4) xyxy ground truth.
        classes: (M,) its classes.

    Returns:
        (M,) bool, True for objects matched with a detection of their class by an IoU of 0.5.
    """
    matched = torch.zeros(len(objects), dtype=torch.bool)
    overlaps = box_iou(boxes.double(), objects.double())
    for row in overlaps.masked_fill(labels[:, None] != classes, 0.0):
        free = row.masked_fill(matched, 0.0)
        if len(free) and free.max() >= 0.5:
            matched[free.argmax()] = True
    return matched


def best_stage(lost: Tensor) -> int:
    """Return the index of the stage with most of the lost objects (S - 1, M), the latest of ties.

    The latest, since the first stage covers images evenly and hits some objects by chance.
    """
    return len(lost) - 1 - int(lost.sum(dim=1).flip(0).argmax())


def _draw_lost(result: _StageDetections, names: list[str]) -> np.ndarray:
    """Draw lost objects, the detections of the stage with most of them, and of the last stage."""
    lost = result.lost()
    stage = best_stage(lost)
    objects, classes = result.objects[lost[stage]], result.classes[lost[stage]]
    tiles = [draw_boxes(result.image, objects.numpy(), classes.tolist(), names)]
    titles = [f"found by stage {stage + 1}, lost: {len(objects)}"]
    for index in (stage, len(result.stages) - 1):
        boxes, labels, scores = result.stages[index]
        drawn = (boxes.numpy(), labels.tolist(), names, scores.tolist())
        tiles.append(draw_boxes(result.image, *drawn))
        titles.append(f"stage {index + 1}")
    return hstack(tiles, titles)


def _draw_routes(routes: Sequence[Sequence[_Route]], title: str, output: Path) -> None:
    """Draw every group of proposals as a dot, joined with the group it was refined from.

    Routes are, for each stage, the stages that each of its groups went through, itself last.
    """
    figure, axes = _new_figure(2 + 1.4 * len(routes), 4.5)
    dots = route_dots(routes)
    for route, dot in dots.items():
        plain = route == tuple(range(1, len(route) + 1))
        color = "tab:blue" if plain else "tab:gray"
        width, order = (2.5, 3) if plain else (0.7, 1)
        if route:
            line = route_line(dots, dots[route[:-1]], dot)
            axes.plot(line[:, 0], line[:, 1], color=color, linewidth=width, zorder=order)
        axes.plot(*dot, "o", color=color, markersize=5, zorder=order)
    ticks = [f"stage {i}\n{len(r)}" for i, r in enumerate(routes, start=1)]
    axes.set_xticks(range(len(routes) + 1), ["initial\n1", *ticks])
    axes.set_yticks([])
    axes.set_title(title)
    axes.set_xlabel(
        "groups refined by each stage; blue: the plain cascade, all that inference runs"
    )
    axes.spines["left"].set_visible(False)
    figure.savefig(output, dpi=110)


def route_dots(routes: Sequence[Sequence[_Route]]) -> dict[_Route, _Dot]:
    """Return the position of every route's group: its stage, and its place within the stage.

    The plain cascade, the last group of every stage, is the line at the bottom.
    """
    dots: dict[_Route, _Dot] = {(): (0.0, 0.0)}
    for stage, of_stage in enumerate(routes, start=1):
        for height, route in enumerate(reversed(of_stage)):
            dots[route] = (float(stage), float(height))
    return dots


def route_line(dots: Mapping[_Route, _Dot], start: _Dot, end: _Dot) -> np.ndarray:
    """Return points (K, 2) of a line that is bent to avoid the dots of stages it skips."""
    steps = np.linspace(0, 1, 8 * round(end[0] - start[0]) + 1)[:, None]
    straight = (1 - steps) * np.array(start) + steps * np.array(end)
    skipped = np.array([d for d in dots.values() if start[0] < d[0] < end[0]])
    if not len(skipped):
        return straight
    arc = 4 * steps * (1 - steps) * np.array([0.0, 1.0])
    lines = [straight + bend * arc for bend in _BENDS]
    return max(lines, key=lambda line: np.linalg.norm(line[:, None] - skipped, axis=2).min())


def _draw_counts(detected: Sequence[int], lost: Sequence[int], output: Path) -> None:
    """Draw how many objects each stage detects, and how many of these the last stage loses."""
    figure, axes = _new_figure(2 + len(detected), 3.5)
    stages = range(1, len(detected) + 1)
    kept = [a - b for a, b in zip(detected, lost, strict=True)]
    axes.bar(stages, kept, color="tab:blue", label="found, and by the last stage as well")
    axes.bar(stages, lost, bottom=kept, color="tab:red", label="found, but lost by the last stage")
    for stage, total, number in zip(stages, detected, lost, strict=True):
        text = f"{number} of {total}" if number else str(total)
        axes.text(stage, total, text, ha="center", va="bottom")
    axes.set_xticks(list(stages))
    axes.set_xlabel("stage")
    axes.set_ylabel("objects found")
    axes.set_ylim(0, 1.15 * max(1, *detected))  # space for the numbers, also without objects
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=2, frameon=False)
    figure.savefig(output, dpi=110)


def _new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
