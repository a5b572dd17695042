"""Chart of experiments: a dot for each seed, a bar for their mean."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from draw_lengths import words_of
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

_NMS_COLORS = {"off": "tab:gray", "on": "tab:blue"}
_BAR_ALPHA = 0.5

Rows = Sequence[dict[str, str]]


def draw_results(rows: Rows, output: str | Path, metrics: Sequence[str] = ("AP", "AP50")) -> None:
    """Draw a row of panels per dataset, a panel per metric, a bar per variant and NMS setting.

    Args:
        rows: of ``tools/experiments.py``: ``set``, ``config``, ``opts``, ``nms`` and metrics.
        output: file to write.
        metrics: columns to draw.
    """
    names = dict.fromkeys(row["set"] for row in rows)
    by_set = {name: [r for r in rows if r["set"] == name] for name in names}
    # By name, so that variants of a method stand together, whenever they were run.
    variants = {name: sorted({_label(r) for r in members}) for name, members in by_set.items()}
    heights = [0.8 + 0.45 * len(variants[name]) for name in by_set]
    figure = Figure(figsize=(5 + 4 * len(metrics), 1 + sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(
        len(by_set), len(metrics), squeeze=False, sharey="row", height_ratios=heights
    )
    for line, (name, members) in zip(panels, by_set.items(), strict=True):
        for axes, metric in zip(line, metrics, strict=True):
            _draw_panel(axes, members, variants[name], metric)
            axes.set_title(f"{name}, {metric}")
        line[0].set_yticks(range(len(variants[name])), variants[name])
        line[0].invert_yaxis()
    handles = [Patch(color=c, alpha=_BAR_ALPHA, label=nms) for nms, c in _NMS_COLORS.items()]
    panels[0][-1].legend(handles=handles, title="NMS", loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(output, dpi=110)


def _label(row: dict[str, str]) -> str:
    """Name of the config without its folder, then the overrides without the paths of the keys."""
    words = words_of(row)
    pairs = zip(words[::2], words[1::2], strict=True)
    overrides = ", ".join(f"{key.rsplit('.', 1)[-1]} {value}" for key, value in pairs)
    return row["config"].rsplit("/", 1)[-1] + (f"\n{overrides}" if overrides else "")


def _draw_panel(axes: Axes, rows: Rows, variants: Sequence[str], metric: str) -> None:
    for position, variant in enumerate(variants):
        of_variant = [r for r in rows if _label(r) == variant]
        settings = [nms for nms in _NMS_COLORS if any(r["nms"] == nms for r in of_variant)]
        for index, nms in enumerate(settings):
            values = [float(r[metric]) for r in of_variant if r["nms"] == nms]
            y, color = position + 0.36 * (index - (len(settings) - 1) / 2), _NMS_COLORS[nms]
            axes.barh(y, mean(values), 0.34, color=color, alpha=_BAR_ALPHA)
            axes.plot(values, [y] * len(values), "o", color=color, markersize=4)
    axes.set_xlim(0, max(1.0, axes.get_xlim()[1]))
    axes.grid(alpha=0.3, axis="x")
