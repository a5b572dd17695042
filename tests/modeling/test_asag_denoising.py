"""Denoising queries of ASAG: which there are, and who sees whom."""

import pytest
import torch

from dsrcnn.modeling.asag import Objects, denoising_mask, noisy_queries


def objects(*counts):
    """Images with so many objects, padded."""
    most = max(counts)
    boxes = torch.rand(len(counts), most, 4, generator=torch.Generator().manual_seed(1)) * 0.2 + 0.4
    mask = torch.arange(most) < torch.tensor(counts).unsqueeze(1)
    return Objects(boxes, torch.zeros(len(counts), most, dtype=torch.int64), mask)


def test_objects_are_repeated_as_often_as_there_is_room():
    found = noisy_queries(objects(2, 3), 5, 0.4)
    assert found.assignment.tolist() == [[0, 1, 0, 1, -1], [0, 1, 2, -1, -1]]
    assert found.group.tolist() == [[0, 0, 1, 1, -1], [0, 0, 0, -1, -1]]
    whole = torch.tensor([0.5, 0.5, 1.0, 1.0])
    assert (found.boxes[found.group < 0] == whole).all()


@pytest.mark.parametrize("counts", [(0, 0), (0, 3), (6, 1)])
def test_images_without_objects_or_with_more_than_room_have_padding(counts):
    found = noisy_queries(objects(*counts), 5, 0.4)
    for image, count in enumerate(counts):
        assert (found.assignment[image] >= 0).any() == (0 < count <= 5)


def test_noise_is_bounded_by_the_box_and_the_image():
    torch.manual_seed(0)
    clean = objects(1)
    found = noisy_queries(clean, 2000, 0.4).boxes[0]
    centre, size = clean.boxes[0, 0].split(2)
    moved = (found[:, :2] - centre).abs() / (size / 2)
    changed = (found[:, 2:] - size).abs() / size
    assert moved.max() <= 0.4 + 1e-5
    assert moved.max() > 0.35
    assert changed.max() <= 0.4 + 1e-5
    assert changed.max() > 0.35
    assert torch.equal(noisy_queries(clean, 3, 0.0).boxes[0], clean.boxes[0].expand(3, 4))
    large = Objects(torch.tensor([[[0.9, 0.5, 0.9, 1.0]]]), clean.labels, clean.mask)
    assert noisy_queries(large, 500, 0.9).boxes.max() <= 1


def test_a_repetition_sees_itself_and_the_anchors_and_no_anchor_sees_it():
    """Five denoising queries of two objects; three anchors, of which two are valid."""
    group = noisy_queries(objects(2), 5, 0.4).group
    found = denoising_mask(group, torch.tensor([[True, True, False]]))[0].int()
    expected = [
        [1, 1, 0, 0, 0, 1, 1, 0],
        [1, 1, 0, 0, 0, 1, 1, 0],
        [0, 0, 1, 1, 0, 1, 1, 0],
        [0, 0, 1, 1, 0, 1, 1, 0],
        [0, 0, 0, 0, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1, 1, 1],
    ]
    assert found.tolist() == expected
