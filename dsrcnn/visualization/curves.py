"""Training curves from Detectron2's ``metrics.json``."""

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..errors import DataError
from ..structures import OVERLAPS

_LOSSES = ("loss_ce", "loss_bbox", "loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc")


class _Panel(NamedTuple):
    """Curves in one plot; `right` is (key, label) of a dotted curve with its own axis."""

    title: str
    keys: Sequence[str]
    right: tuple[str, str] | None = None
    limits: tuple[float, float] | None = None
    marker: str = ""


_BASIC = (
    _Panel("total loss", ("total_loss", "plain/total_loss"), right=("lr", "learning rate")),
    _Panel("losses of the last stage", (*_LOSSES, *(f"loss_{kind}" for kind in OVERLAPS))),
)
_MIXTURE = _Panel(
    "mixture of experts", ("dpg/entropy", "dpg/variation"), ("dpg/tau", "temperature"), (0, 1)
)
_DYNAMIC_RCNN = (
    _Panel("foreground IoU threshold", ("dynamic_rcnn/iou_stat", "dynamic_rcnn/iou_thresh")),
    _Panel("transition point of the box loss", ("dynamic_rcnn/err_stat", "dynamic_rcnn/beta")),
)


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """Read the entries of ``metrics.json``, ascending by iteration.

    A resumed run replaces what it repeats. A truncated last line, as on a full disk, is ignored,
    and so are values that are no numbers.

    Raises:
        DataError: if no line has the scalars of an iteration.
    """
    by_iteration: dict[int, dict[str, float]] = {}
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        iteration: Any = entry.get("iteration") if isinstance(entry, dict) else None
        if _is_finite(iteration):
            numbers = {k: float(v) for k, v in entry.items() if _is_plotted(v)}
            by_iteration.setdefault(int(iteration), {}).update(numbers)
    if not any(len(entry) > 1 for entry in by_iteration.values()):
        raise DataError(
            f"{path} has no scalars of a training, which are lines such as "
            '{"iteration": 19, "total_loss": 3.2}. Take the metrics.json of a run that has trained '
            "for some iterations."
        )
    return [by_iteration[i] for i in sorted(by_iteration)]


def _is_finite(value: Any) -> bool:
    """Whether a value of JSON is a number that a plot can show."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and -1e300 < value < 1e300


def _is_plotted(value: Any) -> bool:
    return _is_finite(value) or (isinstance(value, float) and math.isnan(value))


def draw_curves(metrics: str | Path, output: str | Path) -> None:
    """Write `plot_metrics` to a file.

    Raises:
        DataError: if there is nothing to draw.
    """
    plot_metrics(metrics).savefig(output, dpi=110)


def draw_checkpoints(table: str | Path, output: str | Path) -> None:
    """Plot the AP of evaluated checkpoints over iterations, from a CSV file, into a file.

    Args:
        table: CSV file with the columns ``iteration`` and such as ``bbox/AP``.
        output: picture to write.

    Raises:
        DataError: if the table has no AP.
    """
    with Path(table).open(newline="", encoding="utf-8") as file:
        rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    keys = [k for k in (rows[0] if rows else ()) if k.rsplit("/", 1)[-1] in ("AP", "AP50", "AP75")]
    if not keys:
        raise DataError(f"{table} has no AP; evaluate on a dataset with annotations.")
    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for key in keys:
        _plot(axes, rows, key, marker="o")
    axes.set_xlabel("iteration")
    axes.set_ylim(0, 100)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(output, dpi=110)


def plot_metrics(metrics: str | Path) -> Figure:
    """Plot loss, losses of the last stage, learning rate and AP of ``metrics.json``.

    Further panels show what a method logs: positives by stage (DLA), the mixture (DPG), threshold
    and transition point with the statistics they follow (Dynamic R-CNN). With SQR the loss of the
    plain cascade is beside the sum.

    Raises:
        DataError: if there is nothing to draw.
    """
    entries = read_metrics(metrics)
    known = {key for entry in entries for key in entry}
    panels = [*_BASIC, _ap_panel(known)]
    positives = sorted(key for key in known if key.startswith("dla/positives"))
    if positives:  # the last stage has no number and comes last
        panels.append(_Panel("positives per image", [*positives[1:], positives[0]]))
    if known & set(_MIXTURE.keys):
        panels.append(_MIXTURE)
    if "dynamic_rcnn/iou_thresh" in known:
        panels += _DYNAMIC_RCNN
    figure = Figure(figsize=(4 * len(panels), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for key in [k for k in panel.keys if k in known] or panel.keys:
            _plot(axes, entries, key, marker=panel.marker)
        axes.set_title(panel.title)
        axes.set_xlabel("iteration")
        axes.legend()
        axes.grid(alpha=0.3)
        if panel.limits:
            axes.set_ylim(*panel.limits)
        if panel.right:
            right = axes.twinx()
            _plot(right, entries, panel.right[0], color="tab:gray", linestyle=":")
            right.set_ylabel(panel.right[1])
    return figure


def _ap_panel(known: set[str]) -> _Panel:
    """AP of the test set, or of each of several, whose names their keys begin with."""
    ends = ("bbox/AP", "bbox/AP50", "bbox/AP75")
    keys = [k for end in ends for k in sorted(known) if k == end or k.endswith(f"/{end}")]
    if sum(key.endswith("bbox/AP") for key in keys) > 1:
        keys = [key for key in keys if key.endswith("bbox/AP")]
    return _Panel("validation AP", keys or ends, limits=(0, 100), marker="o")


def _plot(axes: Axes, entries: list[dict[str, float]], key: str, **style: Any) -> None:
    points = [(e["iteration"], e[key]) for e in entries if key in e]
    axes.plot([x for x, _ in points], [y for _, y in points], label=key, **style)
