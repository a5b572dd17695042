"""AdaMixer's box format."""

import pytest
import torch

from dsrcnn.structures import boxes_to_xyzr, xyzr_to_boxes

BOXES = torch.tensor([[10.0, 20, 74, 36], [0, 0, 8, 8], [-5, 3, 1000, 700]], dtype=torch.float64)


def test_numbers_by_hand():
    # 64 x 16 pixels: scale 32 = 2^5, ratio 1/4 = 2^-2.
    assert boxes_to_xyzr(BOXES[0]).tolist() == pytest.approx([42, 28, 5, -2], abs=1e-5)
    expected = [42 / 4, 28 / 4, 3, -1]  # in units of 4 pixels, half of the ratio's logarithm
    found = boxes_to_xyzr(BOXES[0], unit=4.0, ratio_scale=0.5)
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_published_numbers():
    """The two parametrisations of one box, and AdaMixer's first query of a 1333 x 800 image."""
    asag = xyzr_to_boxes(torch.tensor([100, 50, 3, 0.5]), unit=4.0, ratio_scale=0.5)
    expected = [388.6863, 177.3726, 411.3137, 222.6274]
    assert asag.tolist() == pytest.approx(expected, abs=1e-3)
    assert xyzr_to_boxes(torch.tensor([400.0, 200, 5, 1])).tolist() == pytest.approx(
        expected, abs=1e-3
    )
    moved = torch.tensor([104, 48, 3.1, 0.3])
    box = xyzr_to_boxes(moved, unit=4.0, ratio_scale=0.5)
    assert box.tolist() == pytest.approx([402.0712, 170.8879, 429.9288, 213.1121], abs=1e-3)
    first = boxes_to_xyzr(torch.tensor([0.0, 0, 1333, 800]))
    assert first[2:].tolist() == pytest.approx([10.012159, -0.736605], abs=1e-5)


@pytest.mark.parametrize("options", [{}, {"unit": 4.0, "ratio_scale": 0.5}, {"unit": 16.0}])
def test_the_way_back(options):
    torch.testing.assert_close(
        xyzr_to_boxes(boxes_to_xyzr(BOXES, **options), **options), BOXES, rtol=1e-5, atol=1e-4
    )


def test_boxes_without_area_and_wild_numbers_stay_finite():
    broken = torch.tensor([[5.0, 5, 5, 9], [9.0, 9, 3, 3]])
    assert torch.isfinite(boxes_to_xyzr(broken)).all()
    assert torch.isfinite(xyzr_to_boxes(torch.tensor([0.0, 0, 500, -500]))).all()
