"""Loss and AP over a training run, from Detectron2's ``metrics.json``."""

import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

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

    With DLA there is a fourth picture: proposals that learn an object, by stage.

    Args:
        metrics: ``metrics.json`` of a run.
        output: file to write.
    """
    entries = read_metrics(metrics)
    positives = sorted({k for e in entries for k in e if k.startswith("dla/positives")})
    count = 4 if positives else 3
    figure = Figure(figsize=(4 * count, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right, *rest = figure.subplots(1, count)
    _plot(left, entries, ["total_loss"], "total loss")
    rate = left.twinx()
    _plot(rate, entries, ["lr"], "", color="tab:gray", linestyle=":")
    rate.set_ylabel("learning rate")
    rate.get_legend().remove()
    _plot(middle, entries, ["loss_ce", "loss_bbox", "loss_giou"], "losses of the last stage")
    _plot(right, entries, ["bbox/AP", "bbox/AP50", "bbox/AP75"], "validation AP", marker="o")
    right.set_ylim(0, 100)
    if rest:
        # The last stage is logged without a number, as its losses are; it belongs at the end.
        _plot(rest[0], entries, [*positives[1:], positives[0]], "positives per image")
    figure.savefig(output, dpi=110)


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
