"""Plots of an evaluation; each returns a Matplotlib figure."""

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..evaluation.thresholds import ClassCurve
from .fonts import plot_labels

_MOST_CURVES = 12  # more would not be told apart


def plain_text(text: str) -> str:
    """Write a name so that Matplotlib shows it as it is: no formula, never left out.

    Names of any script need the families of `plot_labels` beside it.
    """
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plot_curves(curves: Sequence[ClassCurve], classes: Sequence[str], threshold: float) -> Figure:
    """Plot precision over recall, and F1 over the threshold, of the most frequent classes."""
    figure = _figure(10, 4)
    left, right = figure.subplots(1, 2)
    names, families = plot_labels(tuple(classes))
    known = [(c, n) for c, n in zip(curves, names, strict=True) if c.objects and len(c.scores)]
    known.sort(key=lambda pair: -pair[0].objects)
    for curve, raw in islice(known, _MOST_CURVES):
        name = plain_text(raw)
        best, f1 = curve.best
        left.plot(curve.recall, curve.precision, label=name)
        right.plot(curve.scores, curve.f1, label=f"{name}: {f1:.2f} at {best:.2f}")
    right.axvline(threshold, color="black", linestyle=":", label=f"all classes: {threshold:.2f}")
    left.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    left.set_title("precision and recall, IoU 0.5")
    right.set(xlabel="score threshold", ylabel="F1", xlim=(0, 1), ylim=(0, 1.02))
    right.set_title("F1, and its best threshold")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(prop={"size": 8, "family": families})
    return figure


def plot_errors(costs: Mapping[str, float], counts: Mapping[str, int], threshold: float) -> Figure:
    """Plot the cost of every kind of error in AP50, and its count."""
    figure = _figure(10, 3)
    left, right = figure.subplots(1, 2)
    for axes, values, digits in ((left, costs, 1), (right, counts, 0)):
        bars = axes.barh(list(values), list(values.values()), color="tab:red", alpha=0.7)
        axes.bar_label(bars, fmt=f"%.{digits}f", padding=3)
        axes.invert_yaxis()
        axes.margins(x=0.15)
    left.set_title("AP50 that each kind of error costs")
    right.set_title(f"errors from score {threshold:.2f} on")
    return figure


def plot_confusion(matrix: np.ndarray, classes: Sequence[str]) -> Figure:
    """Plot which classes objects are detected as; rows sum to 1. Rows and columns are classes."""
    size = min(4 + 0.3 * len(classes), 14)
    figure = _figure(size + 1, size)
    axes = figure.subplots()
    shares = matrix / matrix.sum(axis=1, keepdims=True).clip(min=1)
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    texts, families = plot_labels(tuple(classes))
    names = [*map(plain_text, texts)]
    style: dict[str, Any] = {"fontfamily": families}
    axes.set_xticks(range(len(matrix)), [*names, "missed"], rotation=90, **style)
    axes.set_yticks(range(len(matrix)), [*names, "no object"], **style)
    axes.set(xlabel="detected as", ylabel="object")
    if len(classes) <= 15:
        for (row, column), count in np.ndenumerate(matrix):
            color = "white" if shares[row, column] > 0.5 else "black"
            if count:
                axes.text(column, row, str(count), ha="center", va="center", color=color)
    figure.colorbar(picture, ax=axes, label="share of the row")
    return figure


def plot_stages(ap: Sequence[float], seconds: Sequence[float]) -> Figure:
    """Plot AP and the time of an image over the number of stages."""
    figure = _figure(6, 3.2)
    axes = figure.subplots()
    stages = range(1, len(ap) + 1)
    axes.plot(stages, ap, marker="o", color="tab:blue")
    axes.set(xlabel="stages", ylabel="AP")
    axes.set_xticks(list(stages))
    axes.yaxis.label.set_color("tab:blue")
    axes.grid(alpha=0.3)
    right = axes.twinx()
    right.plot(stages, [1000 * s for s in seconds], marker="s", linestyle=":", color="tab:orange")
    right.set_ylabel("ms per image")
    right.yaxis.label.set_color("tab:orange")
    right.set_ylim(bottom=0)
    return figure
