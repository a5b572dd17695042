"""Routes of recollection as they are drawn."""

import numpy as np
import pytest

from dsrcnn.analysis.recollection import route_dots, route_line
from dsrcnn.modeling.decoder.sqr import recollection_windows, routes_of

STARTS = [{"start": start} for start in range(1, 7)]


@pytest.mark.parametrize("kind", [*STARTS, {"dense": True}], ids=str)
def test_a_line_touches_no_dot_but_its_ends(kind):
    routes = routes_of(recollection_windows(6, **kind))
    dots = route_dots(routes)
    assert len(dots) == len(set(dots.values())) == 1 + sum(len(r) for r in routes)
    for route, end in dots.items():
        if not route:
            continue
        start = dots[route[:-1]]
        line = route_line(dots, start, end)
        assert tuple(line[0]) == start
        assert tuple(line[-1]) == end
        others = np.array([d for d in dots.values() if d not in (start, end)])
        clear = np.linalg.norm(line[:, None] - others, axis=2).min()
        assert clear > 0.1, f"{route}: {clear}"


def test_the_plain_cascade_is_the_straight_line_at_the_bottom():
    dots = route_dots(routes_of(recollection_windows(4)))
    assert [dots[tuple(range(1, n + 1))] for n in range(5)] == [(n, 0) for n in range(5)]
    assert not route_line(dots, dots[(1,)], dots[(1, 2)])[:, 1].any()
