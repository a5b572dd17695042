"""Patches of ASAG and their targets, against numbers of the published code and by hand."""

import pytest
import torch

from dsrcnn.modeling.asag.patches import (
    PatchCompressor,
    RelativeTargets,
    TrainingPatches,
    crop_positions,
    cut_patches,
    from_patches,
    object_patches,
    patch_nms,
    random_patches,
    rank_in_group,
    resize_valid,
    targets_in_patches,
    targets_in_quarters,
    targets_of_flips,
)

SIZE = torch.tensor([1333.0, 800.0])
LIMIT = torch.tensor([84 - 15, 50 - 15])  # largest position on P4 of an image of that size


@pytest.mark.parametrize(("center", "coarse", "fine"), [
    ((720, 520), [37, 25], [82, 57]), ((20, 20), [0, 0], [0, 0]),
    ((1320, 820), [69, 35], [152, 85]),
])  # fmt: skip
def test_patches_are_centered_but_inside_of_the_image(center, coarse, fine):
    place, sizes = torch.tensor([center]).float(), SIZE.unsqueeze(0)
    assert crop_positions(place, sizes, 16).tolist() == [coarse]
    assert crop_positions(place, sizes, 8).tolist() == [fine]


def test_patches_are_windows_of_the_map_padded_with_zeros():
    level = torch.arange(2 * 3 * 18 * 20).view(2, 3, 18, 20).float()
    patches = cut_patches(level, torch.tensor([1, 0]), torch.tensor([[2, 1], [0, 3]]))
    assert patches.shape == (2, 225, 3)
    assert torch.equal(patches[0], level[1, :, 1:16, 2:17].flatten(1).T)
    narrow = cut_patches(level[..., :14], torch.tensor([0]), torch.tensor([[0, 0]]))
    assert not narrow.view(15, 15, 3)[:, 14].any()


@pytest.mark.parametrize(("height", "width"), [(20, 30), (9, 40), (15, 15)])
def test_compressed_patches_equal_patches_of_the_compressed_map(height, width):
    torch.manual_seed(0)
    net, level = PatchCompressor(16, 4), torch.randn(2, 16, height, width)
    images = torch.tensor([0, 1, 1])
    positions = torch.tensor([[0, 0], [max(width - 15, 0), max(height - 15, 0)], [2, 0]])
    expected = cut_patches(net(level), images, positions)
    more_cells = torch.cat([level, level.new_zeros(40, 16, height, width)])  # few patches of them
    patches = net.patches(more_cells, images, positions)
    torch.testing.assert_close(patches, expected, rtol=1e-4, atol=1e-5)
    more_patches = net.patches(level, images.repeat(40), positions.repeat(40, 1))
    torch.testing.assert_close(more_patches[:3], expected, rtol=1e-4, atol=1e-5)


def test_valid_parts_are_resized_like_separate_images():
    level, sizes = torch.randn(3, 4, 9, 11), torch.tensor([[11, 9], [7, 9], [1, 2]])
    resized = resize_valid(level, sizes, 30)
    for image, (width, height) in enumerate(sizes.tolist()):
        part = level[image : image + 1, :, :height, :width]
        expected = torch.nn.functional.interpolate(part, (30, 30), mode="bilinear")
        torch.testing.assert_close(resized[image : image + 1], expected, rtol=1e-4, atol=1e-5)


def test_ranks_count_earlier_members_of_the_group():
    assert rank_in_group(torch.tensor([3, 0, 3, 3, 0, 1])).tolist() == [0, 0, 1, 2, 1, 0]
    assert rank_in_group(torch.zeros(0, dtype=torch.int64)).tolist() == []


def test_boxes_of_patches_become_boxes_of_the_image():
    boxes = from_patches(torch.tensor([[[0.5, 0.5, 0.2, 0.4]]]), torch.tensor([[10, 20]]), 16)
    assert boxes.tolist() == [[[10 * 16 + 120, 20 * 16 + 120, 48, pytest.approx(96)]]]


def test_patch_nms_removes_neighbors_of_the_same_image_only():
    centers = torch.tensor([[100.0, 100], [100 + 8 * 16, 100], [100 + 10 * 16, 100], [101, 100]])
    scores, images = torch.tensor([0.5, 0.4, 0.3, 0.6]), torch.tensor([0, 0, 0, 1])
    # Shifted by 8 of 15 cells: IoU 7/23 above 0.25; by 10: 5/25 below it.
    assert patch_nms(centers, scores, images, 16).tolist() == [3, 0, 2]


def test_patch_nms_of_a_batch_equals_that_of_each_image():
    """At any center: half a patch may lie outside of an image."""
    torch.manual_seed(0)
    for _ in range(20):
        centers, images, scores = torch.rand(60, 2) * 700, torch.randint(4, (60,)), torch.rand(60)
        alone = set()
        for image in range(4):
            index = (images == image).nonzero()[:, 0]
            kept = patch_nms(centers[index], scores[index], torch.zeros_like(index), 16)
            alone |= set(index[kept].tolist())
        assert set(patch_nms(centers, scores, images, 16).tolist()) == alone


def targets(*boxes):
    """Ground truths of one image, as fractions of it."""
    count = len(boxes)
    mask = torch.ones(1, count, dtype=torch.bool)
    return RelativeTargets(torch.tensor(boxes).view(1, count, 4), torch.arange(count)[None], mask)


def test_targets_of_flips_are_listed_image_by_image():
    one, other = targets([0.3, 0.4, 0.2, 0.1]), targets([0.6, 0.7, 0.1, 0.3])
    flips = targets_of_flips(RelativeTargets(*map(torch.cat, zip(one, other, strict=True))))
    expected = [[x, y, 0.2, 0.1] for y in (0.4, 0.6) for x in (0.3, 0.7)]
    expected += [[x, y, 0.1, 0.3] for y in (0.7, 0.3) for x in (0.6, 0.4)]
    torch.testing.assert_close(flips.boxes[:, 0], torch.tensor(expected))
    assert flips.mask.all()


def test_targets_of_quarters_have_their_center_inside_and_are_clipped():
    quarters = targets_in_quarters(targets([0.5, 0.25, 0.4, 0.3], [0.2, 0.8, 0.1, 0.1]))
    assert quarters.mask.tolist() == [[True, False], [True, False], [False, True], [False, False]]
    expected = [[0.8, 0.5, 0.4, 0.6], [0.2, 0.5, 0.4, 0.6], [0.4, 0.6, 0.2, 0.2]]
    torch.testing.assert_close(quarters.boxes[quarters.mask], torch.tensor(expected))
    middle = targets(*([0.5, 0.5, width, 0.8] for width in (0.9, 0.3, 0.123)))
    assert targets_in_quarters(middle).mask.all()  # it belongs to all of them


def test_targets_of_probed_patches_are_inside_and_not_larger():
    too_wide, elsewhere = [0.25, 0.6, 0.3, 0.1], [0.9, 0.9, 0.05, 0.1]
    boxes = targets([0.2, 0.5, 0.05, 0.1], [0.131, 0.55, 0.05, 0.1], too_wide, elsewhere)
    sizes, images = SIZE.repeat(2).view(1, 4), torch.tensor([0])
    inside = targets_in_patches(boxes, sizes, images, torch.tensor([[10, 20]]), 16)
    assert inside.mask.tolist() == [[True, True, False, False]]
    expected = [[0.444167, 0.333333, 0.277708, 0.333333], [0.099892, 0.5, 0.199783, 0.333333]]
    torch.testing.assert_close(inside.boxes[0, :2], torch.tensor(expected), rtol=1e-4, atol=1e-5)


def holds(positions, box, stride=16):
    """Whether patches contain a box."""
    low, high = positions * stride, (positions + 15) * stride
    inside = (low[:, 0] <= box[0]) & (low[:, 1] <= box[1])
    return inside & (high[:, 0] >= box[2]) & (high[:, 1] >= box[3])


@pytest.mark.parametrize("stride", [8, 16])
def test_object_patches_hold_their_object_at_random_places(stride):
    torch.manual_seed(0)
    box = torch.tensor([[300.0, 200, 330, 240]])
    positions = torch.cat([object_patches(box, SIZE, stride) for _ in range(300)])
    assert holds(positions, box[0], stride).all()
    assert len(positions.unique(dim=0)) > 30


def test_large_objects_have_no_patch_and_overlapping_ones_share_one():
    assert object_patches(torch.tensor([[0.0, 0, 130, 50]]), SIZE, 16).shape == (0, 2)
    crowd = torch.tensor([[100.0, 100, 140, 140], [105, 100, 145, 140], [600, 600, 640, 640]])
    assert len(object_patches(crowd, SIZE, 16)) == 2
    assert object_patches(torch.zeros(0, 4), SIZE, 16).shape == (0, 2)


def test_patches_at_the_border_and_in_small_images_stay_inside():
    torch.manual_seed(0)
    corner = torch.tensor([[1300.0, 770, 1330, 799]])
    at_corner = torch.cat([object_patches(corner, SIZE, 16) for _ in range(50)])
    assert ((at_corner >= 0) & (at_corner <= LIMIT)).all()
    small = torch.tensor([100.0, 60.0])
    assert object_patches(torch.tensor([[10.0, 10, 30, 30]]), small, 16).tolist() == [[0, 0]]
    assert random_patches(3, small, 16).tolist() == [[0, 0]] * 3
    positions = random_patches(500, SIZE, 16)
    assert positions.min(dim=0).values.tolist() == [0, 0]
    assert torch.equal(positions.max(dim=0).values, LIMIT)


SMALL_OBJECTS = [[300.0, 200, 330, 240], [800.0, 300, 840, 330]]


def complete(images, positions, **settings):
    """Add patches to those of P4 in two images, of which the second has no object."""
    boxes = [torch.tensor([*SMALL_OBJECTS, [0.0, 0, 500, 500]]), torch.zeros(0, 4)]
    patches = TrainingPatches(boxes, SIZE.repeat(2).expand(2, 4), **settings)
    return patches.complete(images, positions, 16)


def test_every_image_gets_at_least_four_patches_around_objects_first():
    positions = torch.tensor([[3, 4], [5, 6]])
    images, all_positions, train_only = complete(torch.tensor([1, 0]), positions)
    assert images.bincount().tolist() == [4, 4]
    assert torch.equal(all_positions[:2], positions)
    assert train_only.tolist() == [False, False] + [True] * 6
    assert ((all_positions >= 0) & (all_positions <= LIMIT)).all()
    added = all_positions[2:][images[2:] == 0]
    assert all(holds(added, box).any() for box in SMALL_OBJECTS)
    enough = torch.zeros(6, dtype=torch.int64), torch.ones(6, 2, dtype=torch.int64)
    images, _, train_only = complete(*enough)
    assert (images.bincount().tolist(), int(train_only.sum())) == ([6, 4], 4)


def test_guided_patches_output_anchors_around_objects_only():
    nothing = torch.zeros(0, dtype=torch.int64)
    images, positions, train_only = complete(nothing, nothing.view(0, 2), guided=True)
    assert images.bincount().tolist() == [4, 4]
    assert train_only[images == 0].tolist() == [False, False, True, True]
    assert train_only[images == 1].all()
    assert all(holds(positions[~train_only], box).any() for box in SMALL_OBJECTS)
