import pytest

from dsrcnn.errors import ConfigError
from dsrcnn.modeling.proposals.learned import initial_boxes


@pytest.mark.parametrize("count", [1, 5, 50, 300])
@pytest.mark.parametrize("mode", ["image", "center", "grid", "random"])
def test_initial_boxes_are_inside_of_the_image(mode, count):
    center, size = initial_boxes(mode, count).split(2, dim=1)
    assert len(center) == count
    assert (size > 0).all()
    assert (center - size / 2 >= -1e-6).all()
    assert (center + size / 2 <= 1 + 1e-6).all()


def test_cells_of_the_grid_cover_the_image_once():
    boxes = initial_boxes("grid", 9)
    assert boxes[:, 2:].prod(dim=1).sum().item() == pytest.approx(1)
    assert boxes[0].tolist() == pytest.approx([1 / 6, 1 / 6, 1 / 3, 1 / 3])
    assert boxes[5].tolist() == pytest.approx([5 / 6, 0.5, 1 / 3, 1 / 3])


def test_unknown_modes_are_refused():
    with pytest.raises(ConfigError, match="'corner'; write one of image, center, grid, random"):
        initial_boxes("corner", 3)
