"""Comparison of results."""

import numpy as np


def same(a, b, atol=1e-4):
    assert len(a) == len(b)
    np.testing.assert_array_equal(a.labels, b.labels)
    np.testing.assert_allclose(a.scores, b.scores, atol=atol)
    np.testing.assert_allclose(a.boxes, b.boxes, atol=100 * atol)
