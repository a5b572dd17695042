"""Loss and AP over a training run, from Detectron2's ``metrics.json``."""

import json
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

    With DLA there is a picture of the proposals that learn an object, by stage; with DPG one of its
    mixtures: entropy, variation between images and temperature.

    Args:
        metrics: ``metrics.json`` of a run.
        output: file to write.
    """
    entries = read_metrics(metrics)
    positives = sorted({k for e in entries for k in e if k.startswith("dla/positives")})
    mixture = sorted({k for e in entries for k in e} & {"dpg/entropy", "dpg/variation"})
    count = 3 + bool(positives) + bool(mixture)
    figure = Figure(figsize=(4 * count, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right, *rest = figure.subplots(1, count)
    _plot(left, entries, ["total_loss"], "total loss")
    _plot_beside(left, entries, "lr", "learning rate")
    overlaps = [f"loss_{kind}" for kind in OVERLAPS if any(f"loss_{kind}" in e for e in entries)]
    _plot(middle, entries, ["loss_ce", "loss_bbox", *overlaps], "losses of the last stage")
    _plot(right, entries, ["bbox/AP", "bbox/AP50", "bbox/AP75"], "validation AP", marker="o")
    right.set_ylim(0, 100)
    if positives:
        # The last stage is logged without a number, as its losses are; it belongs at the end.
        _plot(rest[0], entries, [*positives[1:], positives[0]], "positives per image")
    if mixture:
        _plot(rest[-1], entries, mixture, "mixture of experts")
        rest[-1].set_ylim(0, 1)
        _plot_beside(rest[-1], entries, "dpg/tau", "temperature")
    figure.savefig(output, dpi=110)


def _plot_beside(axes: Axes, entries: list[dict[str, float]], key: str, label: str) -> None:
    """On an axis of its own at the right, dotted."""
    beside = axes.twinx()
    _plot(beside, entries, [key], "", color="tab:gray", linestyle=":")
    beside.set_ylabel(label)
    beside.legend().remove()


def _plot(
    axes: Axes, entries: list[dict[str, float]], keys: list[str], title: str, **style: Any
) -> None:
    for key in keys:
        points = [(e["iteration"], e[key]) for e in entries if key in e]
        axes.plot([x for x, _ in points], [y for _, y in points], label=key, **style)
    axes.set_title(title)
    axes.set_xlabel("iteration")
    axes.legend()
    axes.grid(alpha=0.3)
