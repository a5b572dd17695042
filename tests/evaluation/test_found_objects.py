"""Which objects are found, as by hand."""

import torch

from dsrcnn.evaluation.duplicates import found_objects

OBJECTS = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10], [21, 0, 31, 10]])
CLASSES = torch.tensor([0, 1, 1])


def found(boxes, labels, **options):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return found_objects(boxes, torch.tensor(labels), OBJECTS, CLASSES, **options).tolist()


def test_an_object_is_found_by_a_detection_of_its_class_that_overlaps_enough():
    assert found([[0, 0, 10, 8]], [0]) == [True, False, False]
    assert found([[0, 0, 10, 8]], [1]) == [False, False, False]
    assert found([[0, 0, 10, 4]], [0]) == [False, False, False]  # IoU 0.4
    assert found([[0, 0, 10, 4]], [0], iou=0.4) == [True, False, False]


def test_one_detection_finds_one_object_the_nearer_one():
    assert found([[21, 0, 31, 10]], [1]) == [False, False, True]


def test_a_second_detection_takes_the_object_that_is_left():
    assert found([[21, 0, 31, 10], [21, 0, 31, 10]], [1, 1]) == [False, True, True]


def test_nothing_is_found_by_nothing_and_where_nothing_is():
    assert found([], []) == [False, False, False]
    none = found_objects(torch.ones(2, 4), torch.zeros(2), torch.zeros(0, 4), torch.zeros(0))
    assert none.tolist() == []
