"""Pictures of recollection (SQR): routes through the cascade, and objects that it loses again."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

__all__ = ["draw_found_by_stage", "draw_routes"]


def draw_routes(routes: Sequence[Sequence[tuple[int, ...]]], output: str | Path) -> None:
    """Draw every group of proposals as a dot, joined with the group it was refined from.

    Args:
        routes: for each stage the stages that each of its groups went through, itself last.
        output: file to write.
    """
    figure = Figure(figsize=(2 + 1.4 * len(routes), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    places: dict[tuple[int, ...], tuple[float, float]] = {(): (0.0, 0.0)}
    for stage, of_stage in enumerate(routes, start=1):
        count = len(of_stage)
        for number, route in enumerate(of_stage):
            # The plain cascade, the last group of every stage, is the line at the bottom.
            places[route] = (float(stage), float(count - 1 - number))
    for route, place in places.items():
        if not route:
            continue
        plain = route == tuple(range(1, len(route) + 1))
        before = places[route[:-1]]
        colour = "tab:blue" if plain else "tab:gray"
        width, order = (2.5, 3) if plain else (0.7, 1)
        line = ((before[0], place[0]), (before[1], place[1]))
        axes.plot(*line, color=colour, linewidth=width, zorder=order)
        axes.plot(*place, "o", color=colour, markersize=5, zorder=order)
    axes.plot(0, 0, "o", color="tab:blue", zorder=3)
    ticks = [f"stage {i}\n{len(r)}" for i, r in enumerate(routes, start=1)]
    axes.set_xticks(range(len(routes) + 1), ["initial\n1", *ticks])
    axes.set_yticks([])
    axes.set_xlabel(
        "groups that each stage refines; blue: the plain cascade, all that inference runs"
    )
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(output, dpi=110)


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
    axes.margins(y=0.15)
    axes.legend(loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(output, dpi=110)
