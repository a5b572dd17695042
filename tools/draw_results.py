"""Results of experiments side by side: a dot for each seed, a bar for their mean."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

__all__ = ["draw_results"]

_SUPPRESSION = {"off": "tab:gray", "on": "tab:blue"}
_PALE = 0.5  # of bars, behind their dots


def draw_results(
    rows: Sequence[dict[str, str]], output: str | Path, metrics: Sequence[str] = ("AP", "AP50")
) -> None:
    """Draw one line of panels per data set, one panel per metric, two bars or one per variant.

    Args:
        rows: of ``tools/experiments.py``: ``set``, ``config``, ``opts``, ``nms`` and metrics.
        output: file to write.
        metrics: columns to draw.
    """
    sets = list(dict.fromkeys(row["set"] for row in rows))
    variants = {name: _variants(rows, name) for name in sets}
    heights = [0.8 + 0.45 * len(variants[name]) for name in sets]
    figure = Figure(figsize=(5 + 4 * len(metrics), 1 + sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(
        len(sets), len(metrics), squeeze=False, sharey="row", height_ratios=heights
    )
    for line, name in zip(panels, sets, strict=True):
        for axes, metric in zip(line, metrics, strict=True):
            own = [row for row in rows if row["set"] == name]
            _draw_panel(axes, own, variants[name], metric)
            axes.set_title(f"{name}, {metric}")
        line[0].set_yticks(range(len(variants[name])), variants[name])
        line[0].invert_yaxis()
    handles = [Patch(color=c, alpha=_PALE, label=nms) for nms, c in _SUPPRESSION.items()]
    panels[0][-1].legend(
        handles=handles, title="suppression", loc="upper left", bbox_to_anchor=(1, 1)
    )
    figure.savefig(output, dpi=110)


def _variants(rows: Sequence[dict[str, str]], name: str) -> list[str]:
    """By name, so that what belongs together stands together, whenever it was run."""
    return sorted({_label(row) for row in rows if row["set"] == name})


def _label(row: dict[str, str]) -> str:
    """The config without its folder, and below it what was changed, without the keys' paths."""
    words = row["opts"].split()
    pairs = zip(words[::2], words[1::2], strict=True)
    changed = ", ".join(f"{key.rsplit('.', 1)[-1]} {value}" for key, value in pairs)
    return row["config"].rsplit("/", 1)[-1] + (f"\n{changed}" if changed else "")


def _draw_panel(
    axes: Axes, rows: Sequence[dict[str, str]], variants: Sequence[str], metric: str
) -> None:
    for place, variant in enumerate(variants):
        own = [r for r in rows if _label(r) == variant]
        bars = [nms for nms in _SUPPRESSION if any(r["nms"] == nms for r in own)]
        for index, nms in enumerate(bars):
            values = [float(r[metric]) for r in own if r["nms"] == nms]
            y, color = place + 0.36 * (index - (len(bars) - 1) / 2), _SUPPRESSION[nms]
            axes.barh(y, mean(values), 0.34, color=color, alpha=_PALE)
            axes.plot(values, [y] * len(values), "o", color=color, markersize=4)
    axes.set_xlim(0, max(1.0, axes.get_xlim()[1]))
    axes.grid(alpha=0.3, axis="x")
