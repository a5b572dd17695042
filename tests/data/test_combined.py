"""Images made of several: pixels and boxes go together, and all follows from the seed."""

import numpy as np
import pytest
import torch
from conftest import coco_options, quick_cfg

from dsrcnn.data import build_train_loader
from dsrcnn.data.samplers import Draw
from dsrcnn.data.transforms.mosaic import CombinedDataset, Sample, copy_paste, mixup, mosaic

FILL = (1, 2, 3)
# No mixture of one of them with black is near another.
COLOURS = np.array([(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0)])


def sample(label, height=60, width=80):
    """One bright rectangle, in a colour of its own, on black."""
    image = np.zeros((height, width, 3), np.uint8)
    x1, y1 = np.random.randint(0, width - 25), np.random.randint(0, height - 25)
    x2, y2 = x1 + np.random.randint(10, 25), y1 + np.random.randint(10, 25)
    image[y1:y2, x1:x2] = COLOURS[label]
    return Sample(image, np.array([[x1, y1, x2, y2]], float), np.array([label]))


def drawn(image, label):
    """Box of the pixels that are nearly of a label's colour, None if there are few."""
    ys, xs = np.nonzero((np.abs(image.astype(int) - COLOURS[label]) < 60).all(axis=2))
    return None if len(xs) < 12 else np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])


def test_boxes_of_a_mosaic_contain_their_objects():
    np.random.seed(0)
    seen = np.zeros(4, int)
    for _ in range(1000):
        parts = [sample(label, *np.random.randint(40, 90, 2)) for label in range(4)]
        found = mosaic(parts, 64, min_visible=0.0, fill=FILL)
        assert found.image.shape == (64, 64, 3)
        for label in range(4):
            box = drawn(found.image, label)
            own = found.boxes[found.labels == label]
            if box is not None and len(own):
                seen[label] += 1
                assert (own[0, :2] - 1 <= box[:2]).all()
                assert (box[2:] <= own[0, 2:] + 1).all()
        assert (found.boxes >= 0).all()
        assert (found.boxes <= 64).all()
    assert (seen > 100).all()


def test_each_image_of_a_mosaic_has_its_corner():
    np.random.seed(1)
    colours = [(50, 0, 0), (0, 50, 0), (0, 0, 50), (50, 50, 0)]
    none = np.zeros((0, 4)), np.zeros(0, int)
    parts = [Sample(np.full((40, 40, 3), c, np.uint8), *none) for c in colours]
    found = mosaic(parts, 40, scale=(0.5, 0.5), translate=0.0, fill=FILL)  # the whole canvas
    places = [np.argwhere((found.image == c).all(axis=2)).mean(axis=0) for c in colours]
    assert places[0][1] < places[1][1]  # the first is left of the second
    assert places[0][0] < places[2][0]  # and above the third
    assert places[3][0] > places[1][0]
    assert places[3][1] > places[2][1]
    assert (found.image == FILL).all(axis=2).any()


def test_objects_hardly_seen_in_a_mosaic_are_left_out():
    np.random.seed(0)
    counts = {}
    for share in (0.0, 0.9):
        np.random.seed(0)
        results = [mosaic([sample(i) for i in range(4)], 64, min_visible=share) for _ in range(200)]
        counts[share] = sum(len(r.boxes) for r in results)
    assert counts[0.9] < counts[0.0]


def test_mixup_is_a_weighted_mean_with_the_objects_of_both():
    np.random.seed(0)
    first, second = sample(0, 60, 80), sample(2, 45, 30)
    np.random.seed(5)
    found = mixup(first, second, alpha=8.0)
    np.random.seed(5)
    weight = np.random.beta(8.0, 8.0)
    assert found.labels.tolist() == [0, 2]
    assert found.boxes[0].tolist() == first.boxes[0].tolist()
    assert found.boxes[1] == pytest.approx(second.boxes[0] * 4 / 3)  # 30 x 45 becomes 40 x 60
    x, y = (found.boxes[1, :2] + found.boxes[1, 2:]).astype(int) // 2
    expected = weight * first.image[y, x] + (1 - weight) * COLOURS[2]
    assert found.image[y, x] == pytest.approx(expected, abs=1)


def test_pasted_objects_are_where_their_boxes_are():
    np.random.seed(0)
    for _ in range(200):
        first, second = sample(0), sample(2)
        found = copy_paste(first, second, objects=3)
        assert drawn(found.image, 2).tolist() == found.boxes[-1].tolist()
        assert found.labels[-1] == 2
        assert not np.shares_memory(found.image, first.image)


def test_objects_covered_by_a_pasted_one_are_left_out():
    first = Sample(np.zeros((40, 40, 3), np.uint8), np.array([[0.0, 0, 40, 40]]), np.array([7]))
    small = Sample(np.ones((40, 40, 3), np.uint8), np.array([[1.0, 1, 5, 5]]), np.array([1]))
    large = Sample(np.ones((40, 40, 3), np.uint8), np.array([[0.0, 0, 39, 39]]), np.array([2]))
    assert copy_paste(first, small).labels.tolist() == [7, 1]
    assert copy_paste(first, large).labels.tolist() == [2]
    whole = Sample(small.image, np.array([[0.0, 0, 40, 40]]), np.array([3]))
    assert copy_paste(first, whole).labels.tolist() == [7]  # too large to be pasted


ALWAYS = [
    *("INPUT.AUG.MOSAIC.PROB", 1.0, "INPUT.AUG.MOSAIC.SIZE", 48, "INPUT.AUG.MIXUP.PROB", 0.5),
    *("INPUT.AUG.COPY_PASTE.PROB", 0.5, "SOLVER.MAX_ITER", 10, "INPUT.AUG.PLAIN_END", 0.3),
]


@pytest.fixture
def cfg(tmp_path):
    return quick_cfg(tmp_path / "out", *coco_options(tmp_path, count=6), *ALWAYS)


def test_the_last_part_of_a_training_sees_images_as_they_are(cfg):
    batches = [batch for batch, _ in zip(build_train_loader(cfg), range(10), strict=False)]
    square = [all(x["image"].shape == (3, 48, 48) for x in batch) for batch in batches]
    assert square == [True] * 7 + [False] * 3
    for record in (record for batch in batches for record in batch):
        height, width = record["image"].shape[1:]
        boxes = record["instances"].gt_boxes.tensor
        assert record["instances"].image_size == (height, width)
        assert (boxes[:, 2:] <= torch.tensor([width, height])).all()
        assert record["instances"].gt_classes.dtype == torch.int64


def test_a_combination_follows_from_the_seed_of_the_draw(cfg):
    dataset = build_train_loader(cfg).dataset
    assert isinstance(dataset, CombinedDataset)
    first, again, other = (dataset[Draw(0, seed)] for seed in (1, 1, 2))
    assert first["image"].equal(again["image"])
    assert first["instances"].gt_boxes.tensor.equal(again["instances"].gt_boxes.tensor)
    assert not first["image"].equal(other["image"])
    plain = dataset[Draw(0, 1, combine=False)]
    assert plain["image"].shape != first["image"].shape


def test_objects_cut_by_the_edge_of_the_canvas_are_left_out():
    """Of an object that the canvas cuts, what counts is the share of the whole object."""
    np.random.seed(0)
    # Images as large as the canvas may be: a box over the whole image, cut by both edges.
    whole = lambda: Sample(  # noqa: E731
        np.full((64, 64, 3), 200, np.uint8), np.array([[0.0, 0, 64, 64]]), np.array([0])
    )
    for _ in range(200):
        found = mosaic([whole() for _ in range(4)], 64, scale=(1, 1), min_visible=0.9)
        sides = found.boxes[:, 2:] - found.boxes[:, :2]
        assert (sides.prod(axis=1) >= 0.9 * 64 * 64 - 1).all()
