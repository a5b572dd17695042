import pytest

from dsrcnn.evaluation import duplicates_per_object


def entry(x, *, image=1, category=1, score=0.9, **more):
    return {
        "image_id": image,
        "category_id": category,
        "bbox": [x, 0, 10, 10],
        "score": score,
        **more,
    }


OBJECTS = [entry(0), entry(50), entry(0, category=2), entry(80, iscrowd=1)]


@pytest.mark.parametrize(
    ("detections", "expected"),
    [
        ([], 0),
        ([entry(0), entry(51), entry(1, category=2)], 0),
        ([entry(0), entry(1), entry(2)], 2 / 3),  # IoU 0.82 and 0.67
        ([entry(0), entry(4)], 0),  # IoU 0.43: of no object
        ([entry(0), entry(1, score=0.2)], 0),
        ([entry(0), entry(0, image=2), entry(0, category=2)], 0),
        ([entry(80), entry(80)], 0),
    ],
)
def test_detections_of_an_object_beyond_the_first_count(detections, expected):
    assert duplicates_per_object(detections, OBJECTS) == pytest.approx(expected)


def test_without_objects_there_are_no_duplicates():
    assert duplicates_per_object([entry(0), entry(0)], []) == 0
