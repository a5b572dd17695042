"""Augmentation: boxes contain what they contained, and every draw follows from the seed."""

import cv2
import numpy as np
import pytest
from conftest import tiny_cfg
from detectron2.data import transforms as T
from PIL import Image

from dsrcnn.config import check_config
from dsrcnn.data.mapper import DetectionMapper
from dsrcnn.data.transforms import (
    RandomBlur,
    RandomHSV,
    RandomNoise,
    RandomWarp,
    WarpTransform,
    build_augmentations,
    build_resizing,
)
from dsrcnn.errors import ConfigError

DRAWS = 1000
GEOMETRIC = {
    "rotation": RandomWarp(degrees=180, scale=(1, 1), translate=0),
    "scale": RandomWarp(degrees=0, scale=(0.3, 2.5), translate=0),
    "translation": RandomWarp(degrees=0, scale=(1, 1), translate=0.4),
    "shear": RandomWarp(degrees=0, scale=(1, 1), translate=0, shear=30),
    "perspective": RandomWarp(degrees=0, scale=(1, 1), translate=0, perspective=0.4),
    "everything": RandomWarp(degrees=45, scale=(0.5, 1.5), shear=10, perspective=0.2),
    "vertical flip": T.RandomFlip(prob=0.5, horizontal=False, vertical=True),
    "horizontal flip": T.RandomFlip(prob=0.5),
    "scale jitter": T.AugmentationList(
        [T.ResizeScale(0.1, 2.0, 128, 128), T.FixedSizeCrop((128, 128), pad=False)]
    ),
    "random crop": T.RandomCrop("relative_range", (0.4, 0.4)),
}


def triangle():
    """A drawn mask (H, W) and the box around its pixels."""
    mask = np.zeros((90, 120), np.uint8)
    corners = np.random.randint([20, 20], [100, 70], (3, 2))
    cv2.fillPoly(mask, [corners], 255)
    ys, xs = np.nonzero(mask)
    return mask, np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], float)


@pytest.mark.parametrize("name", GEOMETRIC)
def test_a_transformed_box_contains_the_transformed_object(name):
    np.random.seed(0)
    seen = 0
    for _ in range(DRAWS):
        mask, box = triangle()
        image = np.repeat(mask[..., None], 3, axis=2)
        augmented = T.AugInput(image)
        transforms = T.AugmentationList([GEOMETRIC[name]])(augmented)
        x1, y1, x2, y2 = transforms.apply_box(box[None])[0]
        ys, xs = np.nonzero(augmented.image[..., 0] > 127)
        if len(xs) > 20:
            seen += 1
            # Half a pixel is what interpolation may move an edge.
            assert x1 - 0.6 <= xs.min() and xs.max() + 1 <= x2 + 0.6  # noqa: PT018
            assert y1 - 0.6 <= ys.min() and ys.max() + 1 <= y2 + 0.6  # noqa: PT018
    assert seen > DRAWS / 3


def test_without_rotation_the_box_is_tight():
    np.random.seed(0)
    warp = RandomWarp(degrees=0, scale=(0.7, 1.3), translate=0.05)
    for _ in range(100):
        mask, box = triangle()
        augmented = T.AugInput(np.repeat(mask[..., None], 3, axis=2))
        found = T.AugmentationList([warp])(augmented).apply_box(box[None])[0]
        ys, xs = np.nonzero(augmented.image[..., 0] > 100)
        drawn = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        # Thin corners vanish when they are made smaller.
        assert np.abs(found - drawn).max() < 4


def test_a_quarter_turn_moves_pixels_and_boxes_alike():
    image = np.arange(16, dtype=np.uint8).reshape(4, 4)[..., None].repeat(3, axis=2)
    # Around the centre (2, 2): x' = 4 - y, y' = x.
    warp = WarpTransform(np.array([[0.0, -1, 4], [1, 0, 0], [0, 0, 1]]), (4, 4))
    assert np.array_equal(warp.apply_image(image), np.rot90(image, -1))
    assert warp.apply_box(np.array([[0.0, 0, 1, 2]])).tolist() == [[2, 0, 4, 1]]
    labels = np.arange(16, dtype=np.uint8).reshape(4, 4)
    assert np.array_equal(warp.apply_segmentation(labels), np.rot90(labels, -1))


def test_outside_of_the_image_is_the_fill_colour():
    image = np.full((10, 10, 3), 200, np.uint8)
    warp = WarpTransform(np.array([[1.0, 0, 5], [0, 1, 0], [0, 0, 1]]), (10, 10), (1, 2, 3))
    assert warp.apply_image(image)[5, 2].tolist() == [1, 2, 3]
    assert warp.apply_image(image)[5, 7].tolist() == [200] * 3


def changed(augmentation, image):
    augmented = T.AugInput(image.copy())
    boxes = np.array([[1.0, 2, 3, 4]])
    transforms = T.AugmentationList([augmentation])(augmented)
    assert transforms.apply_box(boxes).tolist() == boxes.tolist()
    assert augmented.image.dtype == np.uint8
    assert augmented.image.shape == image.shape
    return augmented.image


@pytest.fixture
def photo():
    """Smooth colours, as of photographs."""
    small = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return cv2.resize(small, (80, 60), interpolation=cv2.INTER_CUBIC)


def test_hsv_of_no_strength_is_a_round_trip(photo):
    difference = changed(RandomHSV((0, 0, 0)), photo).astype(int) - photo
    assert np.abs(difference).mean() < 1.5  # 8-bit hues are two degrees apart


@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_value_alone_scales_brightness(order):
    image = np.full((4, 4, 3), (100, 50, 20), np.uint8)
    for seed in range(5):
        np.random.seed(seed)
        found = changed(RandomHSV((0, 0, 0.5), order), image)[0, 0] / image[0, 0]
        np.random.seed(seed)
        factor = 1 + np.random.uniform(-1, 1, 3)[2] * 0.5
        assert found == pytest.approx([factor] * 3, rel=0.06)


@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_hue_turns_colours_around_the_circle_whichever_order(order):
    import colorsys

    red = np.array([255, 60, 60])
    image = np.full((2, 2, 3), red if order == "RGB" else red[::-1], np.uint8)
    for seed in range(20):
        np.random.seed(seed)
        found = changed(RandomHSV((1 / 3, 0, 0), order), image)[0, 0].astype(float)
        np.random.seed(seed)
        turn = np.random.uniform(-1, 1, 3)[0] / 3
        hue, saturation, value = colorsys.rgb_to_hsv(*red / 255)
        expected = np.array(colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value)) * 255
        # OpenCV has 180 hues: at most one of them, 195 / 60 grey levels times 2 degrees, apart.
        assert np.abs(found[:: 1 if order == "RGB" else -1] - expected).max() < 8


def test_blur_keeps_the_mean_and_takes_away_detail(photo):
    rough = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    for _ in range(10):
        found = changed(RandomBlur(5), rough)
        assert found.std() < 0.7 * rough.std()
        assert abs(found.mean() - rough.mean()) < 8
    flat = np.full((9, 9, 3), 77, np.uint8)
    assert np.array_equal(changed(RandomBlur(7), flat), flat)


def test_noise_has_the_strength_it_drew():
    flat = np.full((200, 200, 3), 128, np.uint8)
    found = []
    for _ in range(20):
        noisy = changed(RandomNoise(15.0), flat)
        assert abs(noisy.mean() - 128) < 1.5
        found.append(noisy.std())
    assert 0.5 < min(found) < 5
    assert 10 < max(found) < 15.5


ALL = [
    *("INPUT.AUG.HSV.PROB", 0.5, "INPUT.AUG.BLUR.PROB", 0.5, "INPUT.AUG.NOISE.PROB", 0.5),
    *("INPUT.AUG.WARP.PROB", 0.5, "INPUT.AUG.VERTICAL_FLIP", 0.5),
    *("INPUT.AUG.SCALE_JITTER.ENABLED", True, "INPUT.AUG.SCALE_JITTER.SIZE", 64),
]


def test_without_options_only_the_official_augmentation_happens():
    cfg = tiny_cfg()
    assert [type(a).__name__ for a in build_augmentations(cfg)] == ["RandomFlip"]
    assert [type(a).__name__ for a in build_resizing(cfg)] == ["ResizeShortestEdge"]


def record_of(folder, photo):
    Image.fromarray(photo).save(folder / "photo.png")
    boxes = [[5, 5, 30, 30], [40, 10, 20, 40], [60, 40, 19, 19]]
    annotations = [{"bbox": b, "bbox_mode": 1, "category_id": 0, "iscrowd": 0} for b in boxes]
    common = {"file_name": str(folder / "photo.png"), "height": 60, "width": 80}
    return {**common, "image_id": 1, "annotations": annotations}


def test_what_is_drawn_follows_from_the_seed(tmp_path, photo):
    mapper = DetectionMapper(tiny_cfg(*ALL))
    record, found = record_of(tmp_path, photo), []
    for seed in (3, 3, 4):
        np.random.seed(seed)
        found.append(mapper(record))
    assert found[0]["image"].equal(found[1]["image"])
    assert found[0]["instances"].gt_boxes.tensor.equal(found[1]["instances"].gt_boxes.tensor)
    assert not found[0]["image"].equal(found[2]["image"])


def test_boxes_stay_inside_and_have_an_area(tmp_path, photo):
    mapper, record = DetectionMapper(tiny_cfg(*ALL)), record_of(tmp_path, photo)
    counts = set()
    for seed in range(100):
        np.random.seed(seed)
        mapped = mapper(record)
        height, width = mapped["image"].shape[1:]
        assert max(height, width) <= 64
        boxes = mapped["instances"].gt_boxes.tensor
        counts.add(len(boxes))
        assert (boxes[:, :2] >= 0).all()
        assert (boxes[:, 2] <= width).all()
        assert (boxes[:, 3] <= height).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert len(counts) > 1  # some are pushed out of the image


def test_objects_of_which_too_little_is_seen_are_left_out(tmp_path, photo):
    record = record_of(tmp_path, photo)
    shift = WarpTransform(np.array([[1.0, 0, -20], [0, 1, 0], [0, 0, 1]]), (60, 80))
    for share, expected in ((0.0, 3), (0.49, 3), (0.51, 2), (1.0, 2)):  # 15 of 30 columns are left
        mapper = DetectionMapper(augmentations=[shift], min_visible=share)
        assert len(mapper(record)["instances"]) == expected


@pytest.mark.parametrize(
    ("opts", "words"),
    [
        (["INPUT.AUG.HSV.PROB", 1.5], ["HSV.PROB is 1.5", "from 0 to 1"]),
        (["INPUT.AUG.MIN_VISIBLE", -0.1], ["MIN_VISIBLE is -0.1"]),
        (["INPUT.AUG.BLUR.MAX_SIZE", 1], ["MAX_SIZE is 1", "3 or more"]),
        (["INPUT.AUG.WARP.PERSPECTIVE", 0.5], ["PERSPECTIVE is 0.5", "below 0.5"]),
        (["INPUT.AUG.HSV.STRENGTHS", (0.1, 0.2)], ["has 2 numbers"]),
        (["INPUT.AUG.WARP.SCALE", (1.2, 0.8)], ["WARP.SCALE is (1.2, 0.8)", "smallest"]),
        (["INPUT.AUG.SCALE_JITTER.RANGE", (0.0, 2.0)], ["SCALE_JITTER.RANGE is (0.0, 2.0)"]),
    ],
)
def test_values_that_cannot_work_are_refused(opts, words):
    with pytest.raises(ConfigError) as caught:
        check_config(tiny_cfg(*opts))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_box_over_the_border_is_clipped_before_the_image_moves(tmp_path):
    cfg = tiny_cfg("INPUT.RANDOM_FLIP", "none", "INPUT.MIN_SIZE_TRAIN", (100,))
    mapper = DetectionMapper(cfg, is_train=True)
    shift = np.array([[1, 0, 50], [0, 1, 0], [0, 0, 1.0]])
    mapper.augmentations = [WarpTransform(shift, (100, 100))]
    Image.fromarray(np.zeros((100, 100, 3), np.uint8)).save(tmp_path / "image.png")
    entry = {"bbox": [-100, 0, 150, 50], "bbox_mode": 1, "category_id": 0}
    record = {"file_name": str(tmp_path / "image.png"), "annotations": [entry]}
    boxes = mapper(record)["instances"].gt_boxes.tensor
    assert boxes.tolist() == [[50, 0, 100, 50]]


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("INPUT.RANDOM_FLIP", "both", "RANDOM_FLIP is 'both'"),
        ("INPUT.PAD_TO", -1, "PAD_TO is -1"),
        ("INPUT.AUG.MIXUP.ALPHA", 0.0, "ALPHA is 0.0; write a number above 0"),
        ("INPUT.AUG.MOSAIC.SIZE", 0, "MOSAIC.SIZE is 0"),
        ("INPUT.AUG.MOSAIC.SCALE", (2.0, 1.0), "MOSAIC.SCALE is"),
        ("INPUT.AUG.COPY_PASTE.OBJECTS", -1, "OBJECTS is -1"),
        ("INPUT.AUG.COPY_PASTE.MAX_COVERED", 2.0, "MAX_COVERED is 2.0"),
        ("INPUT.AUG.SCALE_JITTER.SIZE", 0, "JITTER.SIZE is 0"),
        ("INPUT.AUG.NOISE.MAX_SIGMA", -1.0, "MAX_SIGMA is -1.0"),
    ],
)
def test_strengths_that_cannot_work_are_refused(key, value, words):
    with pytest.raises(ConfigError, match=words):
        check_config(tiny_cfg(key, value))
