"""Augmentations of single images: boxes follow the pixels, and all follows from the seed."""

import colorsys

import numpy as np
import pytest
from conftest import smooth_image, tiny_cfg, triangle
from detectron2.data import transforms as T

from dsrcnn.data import DetectionMapper
from dsrcnn.data.transforms import photometric
from dsrcnn.data.transforms.build import build_augmentations, build_resizing
from dsrcnn.data.transforms.geometric import RandomWarp, Resize, WarpTransform
from dsrcnn.data.transforms.photometric import RandomBlur, RandomHSV, RandomNoise

DRAWS = 1000


def warp(**changes):
    still = {"degrees": 0, "scale": (1, 1), "translate": 0, "shear": 0, "perspective": 0}
    return RandomWarp(**{**still, "fill": (0, 0, 0), **changes})


GEOMETRIC = {
    "rotation": warp(degrees=180),
    "scale": warp(scale=(0.3, 2.5)),
    "translation": warp(translate=0.4),
    "shear": warp(shear=30),
    "perspective": warp(perspective=0.4),
    "everything": warp(degrees=45, scale=(0.5, 1.5), translate=0.1, shear=10, perspective=0.2),
    "vertical flip": T.RandomFlip(prob=0.5, horizontal=False, vertical=True),
    "horizontal flip": T.RandomFlip(prob=0.5),
    "scale jitter": T.AugmentationList(
        [T.ResizeScale(0.1, 2.0, 128, 128), T.FixedSizeCrop((128, 128), pad=False)]
    ),
    "random crop": T.RandomCrop("relative_range", (0.4, 0.4)),
}


def augmented_triangle(augmentation, threshold):
    """Transformed box of a random triangle, and the box of its pixels, None if there are few."""
    image, box = triangle()
    augmented = T.AugInput(image)
    (box,) = T.AugmentationList([augmentation])(augmented).apply_box(np.array([box]))
    ys, xs = np.nonzero(augmented.image[..., 0] > threshold)
    drawn = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) if len(xs) > 20 else None
    return box, drawn


@pytest.mark.parametrize("name", GEOMETRIC)
def test_transformed_box_contains_the_transformed_object(name):
    seen = 0
    for _ in range(DRAWS):
        box, drawn = augmented_triangle(GEOMETRIC[name], 127)
        if drawn is not None:
            seen += 1
            # Interpolation may move an edge by half a pixel.
            assert (box[:2] - 0.6 <= drawn[:2]).all()
            assert (drawn[2:] <= box[2:] + 0.6).all()
    assert seen > DRAWS / 3


def test_box_is_tight_without_rotation():
    for _ in range(100):
        box, drawn = augmented_triangle(warp(scale=(0.7, 1.3), translate=0.05), 100)
        if drawn is not None:
            assert np.abs(box - drawn).max() < 4  # thin corners vanish in smaller images


def test_quarter_turn_moves_pixels_and_boxes_alike():
    labels = np.arange(16, dtype=np.uint8).reshape(4, 4)
    image = labels[..., None].repeat(3, axis=2)
    # Around the center (2, 2): x' = 4 - y, y' = x.
    turn = WarpTransform(np.array([[0.0, -1, 4], [1, 0, 0], [0, 0, 1]]), (4, 4))
    assert np.array_equal(turn.apply_image(image), np.rot90(image, -1))
    assert np.array_equal(turn.apply_segmentation(labels), np.rot90(labels, -1))
    assert turn.apply_box(np.array([[0.0, 0, 1, 2]])).tolist() == [[2, 0, 4, 1]]


def test_fill_color_surrounds_a_shifted_image():
    image = np.full((10, 10, 3), 200, np.uint8)
    shift = WarpTransform(np.array([[1.0, 0, 5], [0, 1, 0], [0, 0, 1]]), (10, 10), (1, 2, 3))
    assert shift.apply_image(image)[5, 2].tolist() == [1, 2, 3]
    assert shift.apply_image(image)[5, 7].tolist() == [200] * 3


@pytest.mark.parametrize("side", [24, 40, 90, 150])
def test_opencv_resizes_to_the_sizes_of_pillow_and_about_its_pixels(side):
    plain = T.ResizeShortestEdge([side], 200, "choice")
    expected, resized = T.AugInput(smooth_image()), T.AugInput(smooth_image())
    boxes = np.array([[10.0, 20, 40, 50]])
    expected_boxes = plain(expected).apply_box(boxes)
    np.testing.assert_array_equal(Resize(plain, True)(resized).apply_box(boxes), expected_boxes)
    assert resized.image.shape == expected.image.shape
    assert np.abs(resized.image.astype(int) - expected.image).max() <= 6


def apply(augmentation, image):
    augmented = T.AugInput(image.copy())
    boxes = np.array([[1.0, 2, 3, 4]])
    transforms = T.AugmentationList([augmentation])(augmented)
    assert transforms.apply_box(boxes).tolist() == boxes.tolist()
    assert augmented.image.dtype == np.uint8
    assert augmented.image.shape == image.shape
    return augmented.image


@pytest.mark.parametrize("order", ["RGB", "BGR"])
@pytest.mark.parametrize("strengths", [(0, 0, 0), (1 / 3, 0, 0), (0, 0, 0.5)])
def test_hsv_factors_match_an_exact_conversion(order, strengths, monkeypatch):
    monkeypatch.setattr(photometric, "_HSV_STRENGTHS", strengths)
    red = np.array([200, 60, 60])
    image = np.full((2, 2, 3), red if order == "RGB" else red[::-1], np.uint8)
    for seed in range(20):
        np.random.seed(seed)
        pixel = apply(RandomHSV(order), image)[0, 0].astype(float)
        np.random.seed(seed)
        turn, _, factor = np.random.uniform(-1, 1, 3) * strengths
        hue, saturation, value = colorsys.rgb_to_hsv(*red / 255)
        value = min(value * (1 + factor), 1)
        expected = np.array(colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value)) * 255
        # OpenCV has 180 hues; one of them is 140 / 60 gray levels times 2 degrees.
        assert np.abs(pixel[:: 1 if order == "RGB" else -1] - expected).max() < 8


def test_blur_keeps_the_mean_and_removes_detail():
    rough = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    for _ in range(10):
        blurred = apply(RandomBlur(), rough)
        assert blurred.std() < 0.7 * rough.std()
        assert abs(blurred.mean() - rough.mean()) < 8
    flat = np.full((9, 9, 3), 77, np.uint8)
    assert np.array_equal(apply(RandomBlur(), flat), flat)


def test_noise_has_a_random_strength_and_no_bias():
    flat = np.full((200, 200, 3), 128, np.uint8)
    noisy = [apply(RandomNoise(), flat) for _ in range(20)]
    assert all(abs(image.mean() - 128) < 1.5 for image in noisy)
    strengths = [image.std() for image in noisy]
    assert 0.5 < min(strengths) < 5
    assert 10 < max(strengths) < 15.5


def test_default_config_has_only_the_official_augmentation():
    cfg = tiny_cfg()
    assert [type(a).__name__ for a in build_augmentations(cfg)] == ["RandomFlip"]
    assert [type(a).__name__ for a in build_resizing(cfg)] == ["Resize"]


@pytest.fixture
def record(write_image):
    boxes = [[5, 5, 30, 30], [40, 10, 20, 40], [60, 40, 19, 19]]
    annotations = [{"bbox": b, "bbox_mode": 1, "category_id": 0, "iscrowd": 0} for b in boxes]
    name = write_image(smooth_image())
    size = {"height": 60, "width": 80}
    return {"file_name": name, **size, "image_id": 1, "annotations": annotations}


def test_all_augmentations_together_keep_boxes_valid_and_follow_from_the_seed(record):
    keys = ("HSV.PROB", "BLUR.PROB", "NOISE.PROB", "WARP.PROB", "VERTICAL_FLIP")
    options = [x for key in keys for x in (f"INPUT.AUG.{key}", 0.5)]
    mapper = DetectionMapper(tiny_cfg(*options, "INPUT.AUG.SCALE_JITTER.SIZE", 64))
    counts, images = set(), []
    for seed in [0, *range(100)]:
        np.random.seed(seed)
        sample = mapper(record)
        height, width = sample["image"].shape[1:]
        boxes = sample["instances"].gt_boxes.tensor
        images.append((sample["image"].tolist(), boxes.tolist()))
        counts.add(len(boxes))
        assert max(height, width) <= 64
        assert (boxes[:, :2] >= 0).all()
        assert (boxes[:, 2] <= width).all()
        assert (boxes[:, 3] <= height).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert len(counts) > 1  # some are moved out of the image
    assert images[0] == images[1] != images[2]


def test_objects_with_too_little_left_are_dropped(record):
    shift = WarpTransform(np.array([[1.0, 0, -20], [0, 1, 0], [0, 0, 1]]), (60, 80))
    for least, count in ((0.0, 3), (0.49, 3), (0.51, 2), (1.0, 2)):  # 15 of 30 columns are left
        mapper = DetectionMapper(augmentations=[shift], image_format="RGB", min_visible=least)
        assert len(mapper(record)["instances"]) == count


def test_box_over_the_border_is_clipped_before_the_image_moves(write_image):
    shift = WarpTransform(np.array([[1, 0, 50], [0, 1, 0], [0, 0, 1.0]]), (100, 100))
    mapper = DetectionMapper(augmentations=[shift], image_format="RGB")
    entry = {"bbox": [-100, 0, 150, 50], "bbox_mode": 1, "category_id": 0}
    name = write_image(np.zeros((100, 100, 3), np.uint8))
    boxes = mapper({"file_name": name, "annotations": [entry]})["instances"].gt_boxes.tensor
    assert boxes.tolist() == [[50, 0, 100, 50]]
