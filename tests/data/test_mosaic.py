"""Mosaic, MixUp and copy-paste: boxes follow the pixels, and all follows from the seed."""

import numpy as np
import pytest
import torch
from conftest import coco_options, quick_cfg

from dsrcnn.data import build_train_loader
from dsrcnn.data.samplers import Draw
from dsrcnn.data.transforms.mosaic import Sample, copy_paste, mixup, mosaic

FILL = (1, 2, 3)
ZOOM, SHIFT = (f"dsrcnn.data.transforms.mosaic._MOSAIC_{name}" for name in ("SCALE", "TRANSLATE"))
# Any mixture of one of them with black differs clearly from the others.
COLORS = np.array([(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0)])


def rectangle(label, height=60, width=80):
    """A black image with one rectangle in the color of its label."""
    image = np.zeros((height, width, 3), np.uint8)
    x1, y1 = np.random.randint(0, width - 25), np.random.randint(0, height - 25)
    x2, y2 = x1 + np.random.randint(10, 25), y1 + np.random.randint(10, 25)
    image[y1:y2, x1:x2] = COLORS[label]
    return Sample(image, np.array([[x1, y1, x2, y2]], float), np.array([label]))


def uniform(value, side, *boxes, label=0):
    boxes = np.array(boxes, float).reshape(-1, 4)
    return Sample(np.full((side, side, 3), value, np.uint8), boxes, np.full(len(boxes), label))


def visible_box(image, label):
    """Box of the pixels in about the color of a label, None if there are few."""
    ys, xs = np.nonzero((np.abs(image.astype(int) - COLORS[label]) < 60).all(axis=2))
    return None if len(xs) < 12 else np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])


def test_boxes_of_a_mosaic_contain_their_objects():
    seen = np.zeros(4, int)
    for _ in range(1000):
        parts = [rectangle(label, *np.random.randint(40, 90, 2)) for label in range(4)]
        result = mosaic(parts, 64, min_visible=0.0, fill=FILL)
        assert result.image.shape == (64, 64, 3)
        for label in range(4):
            drawn, box = visible_box(result.image, label), result.boxes[result.labels == label]
            if drawn is not None and len(box):
                seen[label] += 1
                assert (box[0, :2] - 1 <= drawn[:2]).all()
                assert (drawn[2:] <= box[0, 2:] + 1).all()
        assert (result.boxes >= 0).all()
        assert (result.boxes <= 64).all()
    assert (seen > 100).all()


def test_each_image_of_a_mosaic_has_its_quadrant(monkeypatch):
    monkeypatch.setattr(ZOOM, (0.5, 0.5))  # the whole canvas
    monkeypatch.setattr(SHIFT, 0.0)
    colors = [(50, 0, 0), (0, 50, 0), (0, 0, 50), (50, 50, 0)]
    result = mosaic([uniform(c, 40) for c in colors], 40, min_visible=0.0, fill=FILL)
    places = [np.argwhere((result.image == c).all(axis=2)).mean(axis=0) for c in colors]
    assert places[0][1] < places[1][1]  # the first is left of the second
    assert places[0][0] < places[2][0]  # and above the third
    assert places[3][0] > places[1][0]
    assert places[3][1] > places[2][1]
    assert (result.image == FILL).all(axis=2).any()


def test_objects_hardly_visible_in_a_mosaic_are_dropped():
    counts = []
    for least in (0.0, 0.9):
        np.random.seed(0)
        results = [
            mosaic([rectangle(i) for i in range(4)], 64, min_visible=least, fill=FILL)
            for _ in range(200)
        ]
        counts.append(sum(len(r.boxes) for r in results))
    assert counts[1] < counts[0]


def test_visible_fraction_counts_what_the_canvas_cuts_off(monkeypatch):
    monkeypatch.setattr(ZOOM, (1, 1))
    for _ in range(200):
        parts = [uniform(200, 64, (0, 0, 64, 64)) for _ in range(4)]
        result = mosaic(parts, 64, min_visible=0.9, fill=FILL)
        sides = result.boxes[:, 2:] - result.boxes[:, :2]
        assert (sides.prod(axis=1) >= 0.9 * 64 * 64 - 1).all()


def test_objects_that_are_all_visible_stay_even_if_nothing_may_be_cut_off():
    counts = []
    for least in (1 - 1e-4, 1.0):
        np.random.seed(0)
        parts = ([rectangle(i, 71, 83) for i in range(4)] for _ in range(200))
        results = [mosaic(four, 64, min_visible=least, fill=FILL) for four in parts]
        counts.append(sum(len(r.boxes) for r in results))
    assert counts[0] == counts[1] > 100


def test_mixup_is_a_weighted_mean_with_the_objects_of_both():
    first, second = rectangle(0, 60, 80), rectangle(2, 45, 30)
    np.random.seed(5)
    result = mixup(first, second, fill=(0, 0, 0))
    np.random.seed(5)
    weight = np.random.beta(8.0, 8.0)
    assert result.labels.tolist() == [0, 2]
    assert result.boxes[0].tolist() == first.boxes[0].tolist()
    assert result.boxes[1] == pytest.approx(second.boxes[0] * 4 / 3)  # 30 x 45 becomes 40 x 60
    x, y = (result.boxes[1, :2] + result.boxes[1, 2:]).astype(int) // 2
    expected = weight * first.image[y, x] + (1 - weight) * COLORS[2]
    assert result.image[y, x] == pytest.approx(expected, abs=1)


def test_pasted_objects_fill_their_boxes():
    for _ in range(200):
        target = rectangle(0)
        result = copy_paste(target, rectangle(2))
        assert visible_box(result.image, 2).tolist() == result.boxes[-1].tolist()
        assert result.labels[-1] == 2
        assert not np.shares_memory(result.image, target.image)


@pytest.mark.parametrize(("pasted", "labels"), [
    ((1, 1, 5, 5), [7, 1]), ((0, 0, 39, 39), [1]), ((0, 0, 40, 40), [7]),
], ids=["small", "covers the other", "too large to paste"])  # fmt: skip
def test_objects_covered_by_a_pasted_one_are_dropped(pasted, labels):
    target = uniform(0, 40, (0, 0, 40, 40), label=7)
    assert copy_paste(target, uniform(1, 40, pasted, label=1)).labels.tolist() == labels


@pytest.fixture
def cfg(tmp_path):
    return quick_cfg(
        tmp_path / "out", *coco_options(tmp_path, count=6),
        "INPUT.AUG.MOSAIC.PROB", 1.0, "INPUT.AUG.MOSAIC.SIZE", 48, "INPUT.AUG.MIXUP.PROB", 0.5,
        "INPUT.AUG.COPY_PASTE.PROB", 0.5, "SOLVER.MAX_ITER", 10, "INPUT.AUG.PLAIN_END", 0.3,
    )  # fmt: skip


def test_end_of_a_training_uses_plain_images(cfg):
    batches = [batch for batch, _ in zip(build_train_loader(cfg), range(10), strict=False)]
    square = [all(x["image"].shape == (3, 48, 48) for x in batch) for batch in batches]
    assert square == [True] * 7 + [False] * 3
    for sample in (sample for batch in batches for sample in batch):
        height, width = sample["image"].shape[1:]
        boxes = sample["instances"].gt_boxes.tensor
        assert sample["instances"].image_size == (height, width)
        assert (boxes[:, 2:] <= torch.tensor([width, height])).all()
        assert sample["instances"].gt_classes.dtype == torch.int64


def test_mixture_follows_from_the_seed_of_the_draw(cfg):
    dataset = build_train_loader(cfg).dataset
    first, again, other = (dataset[Draw(0, seed)] for seed in (1, 1, 2))
    assert first["image"].equal(again["image"])
    assert first["instances"].gt_boxes.tensor.equal(again["instances"].gt_boxes.tensor)
    assert not first["image"].equal(other["image"])
    assert dataset[Draw(0, 1, mix=False)]["image"].shape != first["image"].shape
