"""Pictures of recollection (SQR): routes through the cascade, and objects that it loses again."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

__all__ = ["draw_found_by_stage", "draw_routes", "route_dots", "route_line"]

_Dot = tuple[float, float]  # stage and height
_BENDS = (0.25, -0.25, 0.125, -0.125, 0.4, -0.4)  # heights at mid-line; dots are 1 apart


def draw_routes(
    routes: Sequence[Sequence[tuple[int, ...]]], output: str | Path, *, title: str = ""
) -> None:
    """Draw every group of proposals as a dot, joined with the group it was refined from.

    Args:
        routes: for each stage the stages that each of its groups went through, itself last.
        output: file to write.
        title: above it.
    """
    figure = Figure(figsize=(2 + 1.4 * len(routes), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    dots = route_dots(routes)
    for route, dot in dots.items():
        plain = route == tuple(range(1, len(route) + 1))
        colour = "tab:blue" if plain else "tab:gray"
        width, order = (2.5, 3) if plain else (0.7, 1)
        if route:
            line = route_line(dots, dots[route[:-1]], dot)
            axes.plot(line[:, 0], line[:, 1], color=colour, linewidth=width, zorder=order)
        axes.plot(*dot, "o", color=colour, markersize=5, zorder=order)
    ticks = [f"stage {i}\n{len(r)}" for i, r in enumerate(routes, start=1)]
    axes.set_xticks(range(len(routes) + 1), ["initial\n1", *ticks])
    axes.set_yticks([])
    axes.set_title(title)
    axes.set_xlabel(
        "groups that each stage refines; blue: the plain cascade, all that inference runs"
    )
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(output, dpi=110)


def route_dots(routes: Sequence[Sequence[tuple[int, ...]]]) -> dict[tuple[int, ...], _Dot]:
    """Where the group of every route is drawn: its stage, and its place among those of the stage.

    The plain cascade, the last group of every stage, is the line at the bottom.
    """
    dots: dict[tuple[int, ...], _Dot] = {(): (0.0, 0.0)}
    for stage, of_stage in enumerate(routes, start=1):
        for place, route in enumerate(reversed(of_stage)):
            dots[route] = (float(stage), float(place))
    return dots


def route_line(dots: Mapping[tuple[int, ...], _Dot], start: _Dot, end: _Dot) -> np.ndarray:
    """A line between two dots, bent so that it keeps clear of the dots of stages it skips.

    Returns:
        Points (K, 2) of the line.
    """
    steps = np.linspace(0, 1, 8 * round(end[0] - start[0]) + 1)[:, None]
    straight = (1 - steps) * np.array(start) + steps * np.array(end)
    arc = 4 * steps * (1 - steps) * np.array([0.0, 1.0])
    skipped = np.array([d for d in dots.values() if start[0] < d[0] < end[0]])
    if not len(skipped):
        return straight
    lines = [straight + bend * arc for bend in _BENDS]
    return max(lines, key=lambda line: np.linalg.norm(line[:, None] - skipped, axis=2).min())


def draw_found_by_stage(found: Sequence[int], lost: Sequence[int], output: str | Path) -> None:
    """Draw how many objects each stage finds, and how many of these the last stage has lost.

    Args:
        found: for each stage.
        lost: likewise, 0 for the last.
        output: file to write.
    """
    figure = Figure(figsize=(2 + len(found), 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    stages = range(1, len(found) + 1)
    kept = [a - b for a, b in zip(found, lost, strict=True)]
    axes.bar(stages, kept, color="tab:blue", label="found, and by the last stage as well")
    axes.bar(stages, lost, bottom=kept, color="tab:red", label="found, but lost by the last stage")
    for stage, total, gone in zip(stages, found, lost, strict=True):
        text = f"{gone} of {total}" if gone else str(total)
        axes.text(stage, total, text, ha="center", va="bottom")
    axes.set_xticks(list(stages))
    axes.set_xlabel("stage")
    axes.set_ylabel("objects found")
    axes.set_ylim(0, 1.15 * max(1, *found))  # space for the numbers; a bar of 0 would take it away
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=2, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(output, dpi=110)
