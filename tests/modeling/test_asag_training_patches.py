"""What ASAG's patches learn, against numbers of the published code and by hand."""

import pytest
import torch

from dsrcnn.modeling.asag.training_patches import (
    flipped,
    object_patches,
    quarter_targets,
    random_patches,
    targets_in_patch,
)
from dsrcnn.structures import box_cxcywh_to_xyxy

SIZE = torch.tensor([1333.0, 800.0])


def corners(*boxes):
    return box_cxcywh_to_xyxy(torch.tensor(boxes))


def test_flipped_boxes_are_those_of_the_flipped_image():
    boxes = torch.tensor([[0.3, 0.4, 0.2, 0.1], [0.3, 0.9, 0.2, 0.6]])
    both = flipped(boxes, horizontally=True, vertically=True)
    across = flipped(boxes, horizontally=True, vertically=False)
    torch.testing.assert_close(across[0], torch.tensor([0.7, 0.4, 0.2, 0.1]))
    torch.testing.assert_close(both[1], torch.tensor([0.7, 0.1, 0.2, 0.6]))
    assert torch.equal(flipped(boxes, horizontally=False, vertically=False), boxes)


def test_targets_of_quarters():
    found = quarter_targets(corners([0.5, 0.25, 0.4, 0.3], [0.2, 0.8, 0.1, 0.1]))
    assert [index.tolist() for index, _ in found] == [[0], [0], [1], []]
    expected = [[0.8, 0.5, 0.4, 0.6], [0.2, 0.5, 0.4, 0.6], [0.4, 0.6, 0.2, 0.2]]
    for (_, boxes), box in zip(found, expected, strict=False):
        torch.testing.assert_close(boxes[0], torch.tensor(box))


def test_targets_of_patches():
    boxes = corners(
        [0.2, 0.5, 0.05, 0.1],
        [0.131, 0.55, 0.05, 0.1],
        [0.25, 0.6, 0.3, 0.1],
        [0.9, 0.9, 0.05, 0.1],
    )
    index, found = targets_in_patch(boxes * SIZE.repeat(2), torch.tensor([10, 20]), 16, 15)
    assert index.tolist() == [0, 1]  # the third is too wide, the fourth elsewhere
    expected = [[0.444167, 0.333333, 0.277708, 0.333333], [0.099892, 0.5, 0.199783, 0.333333]]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stride", [8, 16])
def test_object_patches_hold_their_object_wherever_they_are(stride):
    torch.manual_seed(0)
    box = torch.tensor([[300.0, 200, 330, 240]])
    seen = set()
    for _ in range(300):
        ((x, y),) = object_patches(box, SIZE, stride, 15, 0.25).tolist()
        assert x * stride <= 300
        assert y * stride <= 200
        assert (x + 15) * stride >= 330
        assert (y + 15) * stride >= 240
        seen.add((x, y))
    assert len(seen) > 30


def test_large_objects_have_no_patch_and_crowds_one():
    large = torch.tensor([[0.0, 0, 130, 50]])
    assert object_patches(large, SIZE, 16, 15, 0.25).shape == (0, 2)
    crowd = torch.tensor([[100.0, 100, 140, 140], [105, 100, 145, 140], [600, 600, 640, 640]])
    assert len(object_patches(crowd, SIZE, 16, 15, 0.25)) == 2
    assert object_patches(torch.zeros(0, 4), SIZE, 16, 15, 0.25).shape == (0, 2)


def test_patches_at_the_border_and_in_small_images_stay_inside():
    torch.manual_seed(0)
    corner = torch.tensor([[1300.0, 770, 1330, 799]])
    for _ in range(50):
        x, y = object_patches(corner, SIZE, 16, 15, 0.25)[0].tolist()
        assert 0 <= x <= 84 - 15
        assert 0 <= y <= 50 - 15
    small = torch.tensor([100.0, 60.0])
    assert object_patches(torch.tensor([[10.0, 10, 30, 30]]), small, 16, 15, 0.25).tolist() == [
        [0, 0]
    ]
    assert random_patches(3, small, 16, 15).tolist() == [[0, 0]] * 3
    found = random_patches(500, SIZE, 16, 15)
    assert found.min(dim=0).values.tolist() == [0, 0]
    assert found.max(dim=0).values.tolist() == [84 - 15, 50 - 15]
