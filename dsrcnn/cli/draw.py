"""``dsrcnn draw``: pictures of a run."""

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ..analysis.anchors import draw_generated_anchors
from ..analysis.assignment import draw_assignments
from ..analysis.augmented import draw_augmented
from ..analysis.images import Report
from ..analysis.predictions import draw_predictions
from ..analysis.proposals import draw_initial_proposals
from ..analysis.recollection import RecollectionReport, draw_recollection
from ..config import load_cfg
from ..errors import DataError
from ..utils.files import prepare_file, prepare_folder
from ..visualization.curves import draw_curves
from .options import add_model_arguments, find_model, fraction, output_path, positive_int

_Options = dict[str, tuple[Any, Callable[[str], Any], str]]  # by name: default, type and help


class _Drawing(NamedTuple):
    draw: Callable[..., Any]  # of ``dsrcnn.analysis``
    images: int  # by default
    options: _Options  # other arguments
    weights: bool = True  # whether it needs weights


_ENDINGS = (".png", ".pdf", ".svg", ".jpg", ".jpeg", ".webp")  # of Matplotlib
_THRESHOLD: _Options = {"threshold": (0.3, fraction, "least score")}
_NUM_IMAGES: _Options = {"num_images": (100, positive_int, "test images to count objects in")}
_PERMUTATIONS: _Options = {
    "permutations": (0, positive_int, "mixtures of other images to test those of test images with"),
    "num_images": (100, positive_int, "test images of that test"),
}
_TIMES: _Options = {"times": (4, positive_int, "versions of an image")}
_DRAWINGS = {
    "predictions": _Drawing(draw_predictions, 8, _THRESHOLD),
    "augmented": _Drawing(draw_augmented, 4, _TIMES, weights=False),
    "assignment": _Drawing(draw_assignments, 4, {}),
    "proposals": _Drawing(draw_initial_proposals, 4, _PERMUTATIONS),
    "anchors": _Drawing(draw_generated_anchors, 4, {}),
    "recollection": _Drawing(draw_recollection, 4, {**_NUM_IMAGES, **_THRESHOLD}),
}


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """Declare the options of a drawing."""
    if name == "curves":
        parser.add_argument("run", metavar="RUN", help="output folder of a training run")
        text = "file to write (default: RUN/curves.png)"
        parser.add_argument("--output", type=Path, metavar="FILE", help=text)
        return
    drawing = _DRAWINGS[name]
    add_model_arguments(parser, weights=drawing.weights)
    text = f"folder to write to (default: RUN/{name})"
    parser.add_argument("--output", type=Path, metavar="FOLDER", help=text)
    images: _Options = {"images": (drawing.images, positive_int, "images to draw")}
    for option, (default, kind, text) in (images | drawing.options).items():
        flag = f"--{option.replace('_', '-')}"
        metavar = "N" if kind is positive_int else "X"
        text = f"{text} (default: {default})"
        parser.add_argument(flag, type=kind, default=default, metavar=metavar, help=text)


def run(args: argparse.Namespace, name: str) -> int:
    """Draw, and print where the pictures are and what was measured."""
    if name == "curves":
        print(_draw_curves(args))
        return 0
    drawing = _DRAWINGS[name]
    config_file, opts = find_model(args, weights=drawing.weights)
    output = output_path(args, name)
    options = {option: vars(args)[option] for option in ("images", *drawing.options)}
    cfg = load_cfg(config_file, opts)
    prepare_folder(output, "--output")
    result = drawing.draw(cfg, output, **options)
    if name == "predictions":
        print(describe_predictions(result, output, args.threshold))
    else:
        print(_describe(result, output))
    return 0


def _draw_curves(args: argparse.Namespace) -> Path:
    metrics = Path(args.run) / "metrics.json"
    if not os.path.isfile(metrics):
        fault = "is no file" if os.path.exists(metrics) else "does not exist"
        raise DataError(f"{metrics} {fault}; write the output folder of a training run.")
    output = prepare_file(output_path(args, "curves.png"), "--output", _ENDINGS)
    draw_curves(metrics, output)
    return output


def describe_predictions(report: Report, output: Path, threshold: float) -> str:
    """Say where the pictures are, and why they show nothing if they do."""
    text, best = f"{len(report.files)} pictures in {output}", report.statistics["best score"]
    if report.statistics["detections"]:
        return text
    if math.isnan(best):
        return f"{text}; none shows a prediction, since the model detects nothing at all"
    return (
        f"{text}; none shows a prediction, since the best score is {best:.2g}, below --threshold "
        f"{threshold:g}"
    )


def _describe(result: Path | list[Path] | Report | RecollectionReport, output: Path) -> str:
    """Name the files, and the numbers of a report."""
    if isinstance(result, Path):
        return str(result)
    if isinstance(result, list):
        return f"{len(result)} pictures in {output}"
    lines = [", ".join(map(str, result.files))]
    if isinstance(result, Report):
        lines.append(", ".join(f"{k} {v:.4g}" for k, v in result.statistics.items()))
        return "\n".join(lines)
    counts = zip(result.detected, result.lost, strict=True)
    for stage, (detected, lost) in enumerate(counts, start=1):
        text = f"{detected} of {result.objects} objects detected, {lost} lost by the last stage"
        lines.append(f"stage {stage}: {text}")
    return "\n".join(lines)
