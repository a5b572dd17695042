"""Loss and AP over a training run, from Detectron2's ``metrics.json``."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..structures import OVERLAPS

__all__ = ["draw_curves", "read_metrics"]


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """Entries of ``metrics.json``, ascending by iteration; a resumed run replaces what it redoes.

    A last line that was cut off, as by a full disk, is left out.
    """
    by_iteration: dict[int, dict[str, float]] = {}
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        by_iteration.setdefault(entry["iteration"], {}).update(entry)
    return [by_iteration[i] for i in sorted(by_iteration)]


def draw_curves(metrics: str | Path, output: str | Path) -> None:
    """Draw the total loss, the losses of the last stage, the learning rate and AP as a PNG.

    What else a run has logged gets a picture of its own: with DLA the proposals that learn an
    object, by stage; with DPG its mixtures; with Dynamic R-CNN threshold and transition point with
    the statistics that they follow. With SQR the loss of the plain cascade is beside the sum.

    Args:
        metrics: ``metrics.json`` of a run.
        output: file to write.
    """
    entries = read_metrics(metrics)
    known = {key for entry in entries for key in entry}
    positives = sorted(key for key in known if key.startswith("dla/positives"))
    mixture = sorted(known & {"dpg/entropy", "dpg/variation"})
    followed = "dynamic_rcnn/iou_thresh" in known
    count = 3 + bool(positives) + bool(mixture) + 2 * followed
    figure = Figure(figsize=(4 * count, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right, *rest = figure.subplots(1, count)
    totals = [key for key in ("total_loss", "plain/total_loss") if key in known]
    _plot(left, entries, totals, "total loss")
    _plot_beside(left, entries, "lr", "learning rate")
    losses = [key for key in (*_LOSSES, *(f"loss_{kind}" for kind in OVERLAPS)) if key in known]
    _plot(middle, entries, losses, "losses of the last stage")
    _plot(right, entries, ["bbox/AP", "bbox/AP50", "bbox/AP75"], "validation AP", marker="o")
    right.set_ylim(0, 100)
    if positives:
        # The last stage is logged without a number, as its losses are; it belongs at the end.
        _plot(rest.pop(0), entries, [*positives[1:], positives[0]], "positives per image")
    if mixture:
        axes = rest.pop(0)
        _plot(axes, entries, mixture, "mixture of experts")
        axes.set_ylim(0, 1)
        _plot_beside(axes, entries, "dpg/tau", "temperature")
    if followed:
        for axes, kind in zip(rest, _FOLLOWED, strict=True):
            _plot(axes, entries, [f"dynamic_rcnn/{key}" for key in kind[1:]], kind[0])
    figure.savefig(output, dpi=110)


_LOSSES = ("loss_ce", "loss_bbox", "loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc")
_FOLLOWED = (
    ("foreground IoU threshold", "iou_stat", "iou_thresh"),
    ("transition point of the box loss", "err_stat", "beta"),
)


def _plot_beside(axes: Axes, entries: list[dict[str, float]], key: str, label: str) -> None:
    """On an axis of its own at the right, dotted."""
    beside = axes.twinx()
    _plot(beside, entries, [key], "", color="tab:gray", linestyle=":")
    beside.set_ylabel(label)
    beside.legend().remove()


def _plot(
    axes: Axes, entries: list[dict[str, float]], keys: Sequence[str], title: str, **style: Any
) -> None:
    for key in keys:
        points = [(e["iteration"], e[key]) for e in entries if key in e]
        axes.plot([x for x, _ in points], [y for _, y in points], label=key, **style)
    axes.set_title(title)
    axes.set_xlabel("iteration")
    axes.legend()
    axes.grid(alpha=0.3)
