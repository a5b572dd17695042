"""Chart of experiments: a dot for each seed, a bar for their mean."""

import itertools
import textwrap
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from draw_lengths import words_of
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

_NMS_COLORS = {"off": "tab:gray", "on": "tab:blue"}
_BAR_ALPHA = 0.5
_LABEL_WIDTH = 48  # characters; a longer line would take the room of the panels

Rows = Sequence[dict[str, str]]


def draw_results(rows: Rows, output: str | Path, metrics: Sequence[str] = ("AP", "AP50")) -> None:
    """Draw a row of panels per dataset, a panel per metric, a bar per variant and NMS setting.

    Args:
        rows: of ``tools/experiments.py``: ``set``, ``config``, ``opts``, ``nms`` and metrics.
        output: file to write.
        metrics: columns to draw.
    """
    by_set: dict[str, dict[str, list[dict[str, str]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        by_set[row["set"]][_label(row)].append(row)
    # By name, so that variants of a method stand together, whenever they were run.
    placed = {name: _place(sorted(variants)) for name, variants in by_set.items()}
    heights = [0.8 + 0.45 * height for _, height in placed.values()]
    figure = Figure(figsize=(5 + 4 * len(metrics), 1 + sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(
        len(by_set), len(metrics), squeeze=False, sharey="row", height_ratios=heights
    )
    for line, (name, variants) in zip(panels, by_set.items(), strict=True):
        places, height = placed[name]
        for axes, metric in zip(line, metrics, strict=True):
            _draw_panel(axes, variants, places, metric)
            axes.set_title(f"{name}, {metric}")
        line[0].set_yticks(list(places.values()), list(places))
        line[0].set_ylim(height - 0.4, -0.6)
    handles = [Patch(color=c, alpha=_BAR_ALPHA, label=nms) for nms, c in _NMS_COLORS.items()]
    panels[0][-1].legend(handles=handles, title="NMS", loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(output, dpi=110)


def _label(row: dict[str, str]) -> str:
    """Name of the config without its folder, then the overrides without the paths of the keys."""
    words = words_of(row)
    pairs = zip(words[::2], words[1::2], strict=True)
    overrides = ", ".join(f"{key.rsplit('.', 1)[-1]} {value}" for key, value in pairs)
    wrapped = textwrap.wrap(overrides, _LABEL_WIDTH, break_long_words=False)
    return "\n".join([row["config"].rsplit("/", 1)[-1], *wrapped])


def _place(labels: Sequence[str]) -> tuple[dict[str, float], float]:
    """Center labels below each other, two lines to a unit, and return their total height, too."""
    ends = [0.0, *itertools.accumulate(max(1, (1 + x.count("\n")) / 2) for x in labels)]
    centers = [(top + bottom - 1) / 2 for top, bottom in itertools.pairwise(ends)]
    return dict(zip(labels, centers, strict=True)), ends[-1]


def _draw_panel(
    axes: Axes, variants: Mapping[str, Rows], places: Mapping[str, float], metric: str
) -> None:
    for variant, position in places.items():
        rows = variants[variant]
        settings = [nms for nms in _NMS_COLORS if any(r["nms"] == nms for r in rows)]
        for index, nms in enumerate(settings):
            values = [float(r[metric]) for r in rows if r["nms"] == nms]
            y, color = position + 0.36 * (index - (len(settings) - 1) / 2), _NMS_COLORS[nms]
            axes.barh(y, mean(values), 0.34, color=color, alpha=_BAR_ALPHA)
            axes.plot(values, [y] * len(values), "o", color=color, markersize=4)
    axes.set_xlim(0, max(1.0, axes.get_xlim()[1]))
    axes.grid(alpha=0.3, axis="x")
