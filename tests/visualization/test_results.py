"""Results as a picture: where bars and dots are."""

import pytest
from matplotlib.figure import Figure

from tools.draw_results import draw_results


def row(config, seed, nms, ap, opts=""):
    names = {"set": "cells", "config": f"small/{config}", "opts": opts}
    return {**names, "seed": str(seed), "nms": nms, "AP": str(ap)}


@pytest.fixture
def panel(monkeypatch):
    """The first panel of the figure that was saved."""
    found = []
    savefig = Figure.savefig

    def save(figure, *args, **kwargs):
        found.append(figure.axes[0])
        savefig(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", save)
    return lambda: found[0]


def bars_of(axes):
    """Place of the middle and length of every bar."""
    return [(p.get_y() + p.get_height() / 2, p.get_width()) for p in axes.patches]


def test_a_bar_is_the_mean_of_seeds_and_a_dot_each_of_them(panel, tmp_path):
    rows = [row("one", 1, "off", 10), row("one", 2, "off", 20)]
    draw_results(rows, tmp_path / "results.png", metrics=["AP"])
    assert (tmp_path / "results.png").stat().st_size > 1000
    assert bars_of(panel()) == [pytest.approx((0, 15))]
    assert [list(line.get_xdata()) for line in panel().lines] == [[10, 20]]


def test_variants_of_a_method_stand_together_whenever_they_were_run(panel, tmp_path):
    rows = [row("one", 1, "on", 10), row("two", 1, "on", 20), row("one", 1, "on", 30, "A.B 3")]
    draw_results(rows, tmp_path / "results.png", metrics=["AP"])
    labels = [t.get_text() for t in panel().get_yticklabels()]
    assert labels == ["one", "one\nB 3", "two"]
    assert [width for _, width in bars_of(panel())] == [10, 30, 20]


def test_two_bars_lie_around_their_label_and_a_single_one_on_it(panel, tmp_path):
    rows = [row("one", 1, "off", 10), row("one", 1, "on", 20), row("two", 1, "on", 30, "A.B 3")]
    draw_results(rows, tmp_path / "results.png", metrics=["AP"])
    assert [t.get_text() for t in panel().get_yticklabels()] == ["one", "two\nB 3"]
    expected = [(-0.18, 10), (0.18, 20), (1.0, 30)]
    assert [x for bar in bars_of(panel()) for x in bar] == pytest.approx(
        [x for bar in expected for x in bar]
    )
