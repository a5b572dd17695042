"""Report of an evaluation: one HTML page with tables, plots and pictures of the worst images."""

import base64
import copy
import html
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from detectron2.config import CfgNode
from matplotlib.figure import Figure

from ..data.build import build_test_loader
from ..data.images import read_image
from ..engine.console import progress_bar
from ..engine.setup import describe_environment, set_numerics
from ..engine.weight_io import write_atomically
from ..errors import DataError
from ..evaluation.build import build_evaluator
from ..evaluation.coco import CocoEvaluator, coco_ground_truth
from ..evaluation.errors import (
    ErrorReport,
    ImageDetections,
    Judged,
    analyze_errors,
    collect_images,
    count_errors,
    judge,
)
from ..evaluation.thresholds import ClassCurve, best_threshold, class_curves, confusion_matrix
from ..modeling.meta_arch.sparse_rcnn import SparseRCNN
from ..visualization.curves import plot_metrics
from ..visualization.draw import draw_boxes, hstack
from ..visualization.report_plots import plot_confusion, plot_curves, plot_errors, plot_stages
from .images import encode_image, load_predictor, shrunk
from .stages import StageResult, compare_stages

_LONGEST_SIDE = 1600  # of pictures: larger ones would be shrunk by the page, with their lines
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; margin: 1em 0; } img { max-width: 100%; }
td, th { padding: .25em .8em; border-bottom: 1px solid #ddd; text-align: right; }
td:first-child, th:first-child { text-align: left; } pre { background: #f5f5f5; padding: 1em;
overflow-x: auto; font-size: 12px; } figure { margin: 1em 0; }
"""


class Evaluation(NamedTuple):
    """Results that the report shows.

    Attributes:
        metrics: of the test set.
        images: detections and objects by image.
        judged: what became of them.
        curves: over the threshold, by class.
        errors: by kind.
        threshold: score with the best mean F1.
        classes: names.
        stages: results by number of stages; empty for models without a cascade.
        paths: image files by ``image_id``.
    """

    metrics: dict[str, float]
    images: list[ImageDetections]
    judged: list[Judged]
    curves: list[ClassCurve]
    errors: ErrorReport
    threshold: float
    classes: list[str]
    stages: list[StageResult]
    paths: dict[Any, str]


def write_page(cfg: CfgNode, evaluation: Evaluation, path: Path, *, images: int = 8) -> None:
    """Write the report of an evaluation as one ``.html`` file.

    Args:
        cfg: config with weights.
        evaluation: of `evaluate_in_detail`.
        path: file to write.
        images: pictures of the images with most errors.
    """
    # Names of files may be of another encoding.
    page = _page(cfg, evaluation, images).encode("utf-8", "backslashreplace")
    write_atomically(path, lambda file: file.write(page))


@torch.no_grad()
def evaluate_in_detail(cfg: CfgNode) -> Evaluation:
    """Evaluate ``MODEL.WEIGHTS`` on the first test set; analyze errors, thresholds and stages.

    Raises:
        DataError: if there is no test set with labels that COCO metrics apply to.
    """
    if not cfg.DATASETS.TEST:
        raise DataError("DATASETS.TEST is empty, so there is nothing to evaluate. Name a test set.")
    name = cfg.DATASETS.TEST[0]
    evaluator = _coco_evaluator(cfg, name)
    truth = coco_ground_truth(name)
    if all(a["iscrowd"] for a in truth["annotations"]):
        raise DataError(
            f"Dataset {name!r} has no labels, so nothing can be measured. Write dsrcnn eval "
            "without --report, which stores the detections."
        )
    set_numerics(cfg)
    model = load_predictor(cfg).model
    paths: dict[Any, str] = {}
    loader = progress_bar(build_test_loader(cfg, name), desc=name, unit="batch")
    batches = _note_paths(loader, paths)
    is_cascade = isinstance(model, SparseRCNN) and model.head.deep_supervision
    count = cfg.MODEL.SparseRCNN.NUM_HEADS if is_cascade else 1
    evaluators = [copy.copy(evaluator) for _ in range(count)]  # with one ground truth
    if is_cascade:
        stages = compare_stages(cast(SparseRCNN, model), batches, evaluators)
        used = cfg.MODEL.SparseRCNN.INFERENCE_STAGES or count
        metrics = stages[used - 1].metrics
    else:
        stages, used = [], 1
        for batch in batches:
            evaluators[0].process(batch, model(batch))
        metrics = dict(evaluators[0].evaluate().get("bbox", {}))
    detections = evaluators[used - 1].detections
    collected = collect_images(truth, detections, cfg.TEST.MAX_DETECTIONS)
    judged = [judge(image) for image in collected]
    classes = [category["name"] for category in truth["categories"]]
    curves = class_curves(collected, judged, len(classes))
    threshold = best_threshold(curves)
    errors = analyze_errors(collected, judged, len(classes), threshold)
    details = (curves, errors, threshold, classes, stages, paths)
    return Evaluation(metrics, collected, judged, *details)


def _note_paths(
    batches: Iterable[list[dict[str, Any]]], paths: dict[Any, str]
) -> Iterator[list[dict[str, Any]]]:
    """Pass batches through, and note the file of every image."""
    for batch in batches:
        paths.update((record["image_id"], str(record["file_name"])) for record in batch)
        yield batch


def _coco_evaluator(cfg: CfgNode, name: str) -> CocoEvaluator:
    evaluator = build_evaluator(cfg, name)
    if not isinstance(evaluator, CocoEvaluator):
        raise DataError(
            f"Dataset {name!r} is evaluated by {type(evaluator).__name__}; reports need COCO "
            "metrics. Leave out --report."
        )
    evaluator.output_folder = None
    return evaluator


def _page(cfg: CfgNode, evaluation: Evaluation, images: int) -> str:
    metrics, classes, threshold = evaluation.metrics, evaluation.classes, evaluation.threshold
    curves = evaluation.curves
    matrix = confusion_matrix(evaluation.images, len(classes), threshold)
    overall = {k: v for k, v in metrics.items() if not k.startswith("AP-")}
    name = cfg.DATASETS.TEST[0]
    parts = [
        f"<h1>{html.escape(name)}: AP {_number(metrics['AP'])}</h1>",
        f"<p>{html.escape(cfg.MODEL.META_ARCHITECTURE)}, {html.escape(cfg.MODEL.WEIGHTS)}, "
        f"{len(evaluation.images)} images.</p>",
        _table(["", *overall], [["box", *map(_number, overall.values())]]),
        "<h2>Classes</h2>",
        _class_table(metrics, classes, curves),
        _figure(plot_curves(curves, classes, threshold)),
        "<h2>Errors</h2>",
        "<p>A kind costs what AP50 would gain if its errors alone were repaired.</p>",
        _figure(plot_errors(evaluation.errors.costs, evaluation.errors.counts, threshold)),
    ]
    if len(classes) <= 40:
        parts += ["<h2>Confusion</h2>", _figure(plot_confusion(matrix, classes))]
    if evaluation.stages:
        parts += ["<h2>Stages</h2>", *_stages(evaluation.stages)]
    parts += [f"<h2>Images with most errors from score {threshold:.2f} on</h2>"]
    parts += _worst(evaluation, images)
    parts += ["<h2>Training</h2>", *_training(cfg)]
    parts += ["<h2>Config</h2>", f"<pre>{html.escape(cfg.dump())}</pre>"]
    parts += ["<h2>Environment</h2>", f"<pre>{html.escape(describe_environment())}</pre>"]
    head = f"<title>{html.escape(name)}</title><style>{_STYLE}</style>"
    return f"<!doctype html><meta charset='utf-8'>{head}\n" + "\n".join(parts) + "\n"


def _training(cfg: CfgNode) -> list[str]:
    """Schedule, and the curves of the run if its folder has them."""
    node = cfg.SOLVER
    rows = [
        ["iterations", f"{node.MAX_ITER} of {node.IMS_PER_BATCH} images"],
        ["optimizer", f"{node.OPTIMIZER}, learning rate {node.BASE_LR:g}"],
        ["schedule", f"{node.LR_SCHEDULER_NAME}, {node.WARMUP_ITERS} iterations of warm-up"],
        ["input", f"shorter side {cfg.INPUT.MIN_SIZE_TRAIN}, at most {cfg.INPUT.MAX_SIZE_TRAIN}"],
    ]
    parts = [_table(["", ""], rows)]
    metrics = Path(cfg.OUTPUT_DIR) / "metrics.json"
    if metrics.is_file():
        with suppress(DataError):  # a run that ended before its first entry
            parts.append(_figure(plot_metrics(metrics)))
    return parts


def _class_table(
    metrics: Mapping[str, float], classes: Sequence[str], curves: Sequence[ClassCurve]
) -> str:
    rows = []
    for name, curve in zip(classes, curves, strict=True):
        threshold, f1 = curve.best
        numbers = (metrics.get(f"AP-{name}", math.nan), 100 * f1)
        rows.append([name, str(curve.objects), *map(_number, numbers), _number(threshold, 2)])
    return _table(["class", "objects", "AP", "best F1", "at score"], rows)


def _stages(stages: Sequence[StageResult]) -> list[str]:
    keys = ("AP", "AP50", "AP75")
    rows = []
    for stage in stages:
        numbers = [_number(stage.metrics.get(key, math.nan)) for key in keys]
        rows.append([str(stage.stages), *numbers, f"{1000 * stage.seconds:.0f}"])
    table = _table(["stages", *keys, "ms per image"], rows)
    ap = [stage.metrics.get("AP", math.nan) for stage in stages]
    figure = plot_stages(ap, [stage.seconds for stage in stages])
    text = "MODEL.SparseRCNN.INFERENCE_STAGES leaves the cascade after that many stages."
    return [f"<p>{text}</p>", table, _figure(figure)]


def _worst(evaluation: Evaluation, count: int) -> list[str]:
    """Pictures of the images with most errors, ground truth on the left."""
    pairs = zip(evaluation.images, evaluation.judged, strict=True)
    errors = [sum(count_errors(i, j, evaluation.threshold).values()) for i, j in pairs]
    order = sorted(range(len(errors)), key=lambda index: -errors[index])[:count]
    parts = []
    for index in order:
        image = evaluation.images[index]
        path = evaluation.paths[image.image_id]
        picture = _draw(path, image, evaluation)
        text = f"{html.escape(Path(path).name)}: {errors[index]} errors"
        parts.append(f"<figure>{_picture(picture, text)}<figcaption>{text}</figcaption></figure>")
    return parts


def _draw(path: str, image: ImageDetections, evaluation: Evaluation) -> np.ndarray:
    pixels, factor = shrunk(read_image({"file_name": path}, "BGR"), _LONGEST_SIDE)
    shown = image.scores >= evaluation.threshold
    truth = draw_boxes(pixels, factor * image.objects, image.classes.tolist(), evaluation.classes)
    labels, scores = image.labels[shown].tolist(), image.scores[shown].tolist()
    detected = draw_boxes(pixels, factor * image.boxes[shown], labels, evaluation.classes, scores)
    return hstack([truth, detected], ["ground truth", "detections"])


def _picture(image: np.ndarray, text: str) -> str:
    return _tag("jpeg", encode_image(image, ".jpg", quality=85), text)


def _figure(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return _tag("png", buffer.getvalue(), "plot")


def _tag(kind: str, content: bytes, text: str) -> str:
    data = base64.b64encode(content).decode()
    return f"<img alt='{html.escape(text)}' src='data:image/{kind};base64,{data}'>"


def _table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(h)}</th>" for h in headers)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _number(value: float, digits: int = 1) -> str:
    return "" if value != value else f"{value:.{digits}f}"
