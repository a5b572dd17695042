"""What ASAG's patches learn, against numbers of the published code and by hand."""

import pytest
import torch

from dsrcnn.modeling.asag import Objects
from dsrcnn.modeling.asag.patches import (
    PatchLessons,
    flipped,
    object_patches,
    objects_in_patches,
    objects_in_quarters,
    objects_of_flips,
    random_patches,
)

SIZE = torch.tensor([1333.0, 800.0])


def test_flipped_boxes_are_those_of_the_flipped_image():
    boxes = torch.tensor([[0.3, 0.4, 0.2, 0.1], [0.3, 0.9, 0.2, 0.6]])
    both = flipped(boxes, horizontally=True, vertically=True)
    across = flipped(boxes, horizontally=True, vertically=False)
    torch.testing.assert_close(across[0], torch.tensor([0.7, 0.4, 0.2, 0.1]))
    torch.testing.assert_close(both[1], torch.tensor([0.7, 0.1, 0.2, 0.6]))
    assert torch.equal(flipped(boxes, horizontally=False, vertically=False), boxes)


def objects(*boxes):
    """Of one image, as shares of it."""
    count = len(boxes)
    shape = torch.tensor(boxes).view(1, count, 4)
    return Objects(shape, torch.arange(count).view(1, -1), torch.ones(1, count, dtype=torch.bool))


def test_flips_as_published_take_boxes_for_corners():
    found = objects_of_flips(objects([0.3, 0.4, 0.2, 0.1], [0.3, 0.9, 0.2, 0.6]), as_corners=True)
    assert found.mask.shape == (4, 2)
    torch.testing.assert_close(found.boxes[1, 0], torch.tensor([0.8, 0.4, 0.7, 0.1]))
    torch.testing.assert_close(found.boxes[2, 1], torch.tensor([0.3, 0.4, 0.2, 0.1]))


def test_flips_of_a_batch_stand_image_after_image():
    one, other = objects([0.3, 0.4, 0.2, 0.1]), objects([0.6, 0.7, 0.1, 0.1])
    batch = Objects(*(torch.cat(x) for x in zip(one, other, strict=True)))
    found = objects_of_flips(batch)
    centres = [[0.3, 0.4], [0.7, 0.4], [0.3, 0.6], [0.7, 0.6]]
    centres += [[0.6, 0.7], [0.4, 0.7], [0.6, 0.3], [0.4, 0.3]]
    torch.testing.assert_close(found.boxes[:, 0, :2], torch.tensor(centres))


def test_targets_of_quarters():
    found = objects_in_quarters(objects([0.5, 0.25, 0.4, 0.3], [0.2, 0.8, 0.1, 0.1]))
    assert found.mask.tolist() == [[True, False], [True, False], [False, True], [False, False]]
    expected = [[0.8, 0.5, 0.4, 0.6], [0.2, 0.5, 0.4, 0.6], [0.4, 0.6, 0.2, 0.2]]
    torch.testing.assert_close(found.boxes[found.mask], torch.tensor(expected))


@pytest.mark.parametrize("width", [0.9, 0.3, 0.123])
def test_an_object_in_the_middle_belongs_to_all_quarters_whatever_its_size(width):
    found = objects_in_quarters(objects([0.5, 0.5, width, 0.8]))
    assert found.mask.all()


def test_targets_of_patches():
    boxes = objects(
        [0.2, 0.5, 0.05, 0.1],
        [0.131, 0.55, 0.05, 0.1],
        [0.25, 0.6, 0.3, 0.1],
        [0.9, 0.9, 0.05, 0.1],
    )
    sizes, images = SIZE.repeat(2).view(1, 4), torch.tensor([0])
    found = objects_in_patches(boxes, sizes, images, torch.tensor([[10, 20]]), 16, 15)
    # The third is too wide, the fourth elsewhere.
    assert found.mask.tolist() == [[True, True, False, False]]
    expected = [[0.444167, 0.333333, 0.277708, 0.333333], [0.099892, 0.5, 0.199783, 0.333333]]
    torch.testing.assert_close(found.boxes[0, :2], torch.tensor(expected), rtol=1e-4, atol=1e-5)


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


def lessons(**settings):
    small, large = [300.0, 200, 330, 240], [0.0, 0, 500, 500]
    boxes = [torch.tensor([small, [800.0, 300, 840, 330], large]), torch.zeros(0, 4)]
    return PatchLessons(boxes, SIZE.repeat(2).expand(2, 4), **settings)


def test_every_image_has_enough_patches_to_learn_from():
    images, positions = torch.tensor([1, 0]), torch.tensor([[3, 4], [5, 6]])
    owners, places, spare = lessons(least=4).complete(images, positions, 16, 15)
    assert owners.bincount().tolist() == [4, 4]
    assert places[:2].tolist() == positions.tolist()
    assert spare.tolist() == [False, False] + [True] * 6
    assert (places >= 0).all()
    assert (places <= torch.tensor([84 - 15, 50 - 15])).all()
    # Of the first image's three patches more, two are around its small objects.
    around = places[2:][owners[2:] == 0]
    assert holds(around, [300, 200, 330, 240]).any()
    assert holds(around, [800, 300, 840, 330]).any()


def holds(positions, box):
    low, high = positions * 16, (positions + 15) * 16
    inside = (low[:, 0] <= box[0]) & (low[:, 1] <= box[1])
    return inside & (high[:, 0] >= box[2]) & (high[:, 1] >= box[3])


def test_images_with_enough_patches_get_no_more():
    images, positions = torch.zeros(6, dtype=torch.int64), torch.ones(6, 2, dtype=torch.int64)
    owners, _, spare = lessons(least=4).complete(images, positions, 16, 15)
    assert owners.bincount().tolist() == [6, 4]
    assert spare.sum() == 4


def test_guided_patches_around_objects_are_used_and_random_ones_are_not():
    nothing = torch.zeros(0, dtype=torch.int64)
    owners, places, spare = lessons(least=4, guided=True).complete(
        nothing, nothing.view(0, 2), 16, 15
    )
    assert owners.bincount().tolist() == [4, 4]
    assert spare[owners == 0].tolist() == [False, False, True, True]
    assert spare[owners == 1].all()
    used = places[~spare]
    assert holds(used, [300, 200, 330, 240]).any()
    assert holds(used, [800, 300, 840, 330]).any()
