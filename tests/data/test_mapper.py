"""From a record to a model input: the official augmentation, and annotations that are dropped."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from conftest import tiny_cfg
from detectron2.data import transforms as T
from detectron2.structures import BoxMode

from dsrcnn.data import DetectionMapper
from dsrcnn.data.transforms.geometric import Crop, Resize
from dsrcnn.errors import DataError

CROP = "coco/sparse_rcnn_R50_300pro_3x"
XYXY, XYWH = BoxMode.XYXY_ABS, BoxMode.XYWH_ABS


@pytest.fixture
def blank(write_image):
    """An image of 100 x 50 pixels."""
    return write_image(np.zeros((50, 100, 3), np.uint8))


def annotation(*box, mode=XYXY, label=0, **extra):
    return {"bbox": list(box), "bbox_mode": mode, "category_id": label, "iscrowd": 0, **extra}


def record_of(file_name, *annotations, height=50, width=100):
    size = {"height": height, "width": width}
    return {"file_name": file_name, "image_id": 7, **size, "annotations": list(annotations)}


def mapper_of(*augmentations, **options):
    return DetectionMapper(augmentations=augmentations, image_format="RGB", **options)


def instances_of(*record):
    return mapper_of()(record_of(*record))["instances"]


@pytest.mark.parametrize("mask", [
    None, [], "none", [[1, 2, 3, 4]], [[1, 2, 3, 4, 5, "six"]], [[1, 2, 3, 4, 5, math.nan]], 5,
    [[1, 2, 3, 4, 5, 6], [1]], {"counts": 5}, {"counts": [1, 2], "size": "x"},
])  # fmt: skip
def test_unusable_masks_are_refused_where_masks_are_trained_only(blank, mask):
    record = record_of(blank, annotation(10, 10, 30, 30, segmentation=mask))
    assert len(mapper_of()(record)["instances"]) == 1
    with pytest.raises(DataError, match=r"without usable segmentation|a mask that cannot be used"):
        mapper_of(mask_format="polygon")(record)


def test_boxes_at_the_border_stay_even_if_nothing_may_be_cut_off(write_image):
    for width in (77, 78, 84, 85, 87):  # their right ends are rounded beyond the border
        path = write_image(np.zeros((50, width, 3), np.uint8))
        resize = T.ResizeShortestEdge(64, 10_000)
        record = record_of(path, annotation(0, 0, width, 50), width=width)
        assert len(mapper_of(resize, min_visible=1.0)(record)["instances"]) == 1


def test_crop_config_has_the_official_augmentations():
    plain, crop = (DetectionMapper(tiny_cfg(**c), is_train=True) for c in ({}, {"config": CROP}))
    for mapper in (plain, crop):
        assert [type(a) for a in mapper.augmentations] == [T.RandomFlip, Resize]
        assert type(mapper.augmentations[-1].augmentation) is T.ResizeShortestEdge
    assert plain.crop_augmentations is None
    assert [type(a) for a in crop.crop_augmentations] == [*(T.RandomFlip, Resize, Crop, Resize)]


@pytest.mark.parametrize(("flip", "expected"), [
    ("none", []), ("horizontal", [(True, False)]), ("vertical", [(False, True)]),
])  # fmt: skip
def test_config_chooses_the_flip(flip, expected):
    mapper = DetectionMapper(tiny_cfg("INPUT.RANDOM_FLIP", flip), is_train=True)
    flips = [a for a in mapper.augmentations if isinstance(a, T.RandomFlip)]
    assert [(f.horizontal, f.vertical) for f in flips] == expected


def test_images_are_cropped_about_half_of_the_time(blank):
    mapper = mapper_of(T.Resize((8, 8)), crop_augmentations=[T.Resize((16, 16))])
    sides = [mapper(record_of(blank))["image"].shape[-1] for _ in range(400)]
    assert set(sides) == {8, 16}
    assert abs(sides.count(16) - 200) < 50  # five standard deviations


def test_images_are_flipped_about_half_of_the_time(write_image):
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:, :4] = 255
    mapper = DetectionMapper(tiny_cfg("INPUT.MIN_SIZE_TRAIN", (8,)), is_train=True)
    record = record_of(write_image(pixels), height=8, width=8)
    flipped = [bool(mapper(record)["image"][0, 0, 0] == 0) for _ in range(400)]
    assert abs(sum(flipped) - 200) < 50


def test_crops_have_the_official_sizes():
    mapper = DetectionMapper(
        tiny_cfg("INPUT.MIN_SIZE_TRAIN", (48, 64), "INPUT.MAX_SIZE_TRAIN", 100, config=CROP)
    )
    image = np.zeros((300, 400, 3), np.uint8)
    before, cropped, after = set(), [], set()
    for _ in range(60):
        augmented = T.AugInput(image)
        transforms = T.AugmentationList(mapper.crop_augmentations)(augmented).transforms
        _, resize, crop, _ = transforms
        assert 0 <= crop.x0 <= crop.x0 + crop.w <= resize.new_w
        assert 0 <= crop.y0 <= crop.y0 + crop.h <= resize.new_h
        before.add(resize.new_h)
        cropped += [crop.h, crop.w]
        after.add(min(augmented.image.shape[:2]))
    assert before == {400, 500, 600}  # the height is the short side
    assert 384 <= min(cropped) < 420
    assert 560 < max(cropped) <= 600
    assert after == {48, 64}


@pytest.mark.parametrize("config", ["coco/sparse_rcnn_R50_100pro_3x", CROP])
def test_boxes_follow_the_pixels(write_image, config):
    pixels = np.zeros((200, 260, 3), np.uint8)
    pixels[60:140, 70:180] = 255
    record = record_of(write_image(pixels), annotation(70, 60, 180, 140), height=200, width=260)
    mapper = DetectionMapper(tiny_cfg("INPUT.MIN_SIZE_TRAIN", (150, 200), config=config))
    seen = 0
    for _ in range(16):
        sample = mapper(record)
        rows, columns = np.nonzero(sample["image"][0].numpy() > 127)
        if len(rows):  # else the object is not in the crop
            seen += 1
            expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            box = sample["instances"].gt_boxes.tensor[0].tolist()
            assert box == pytest.approx(expected, abs=1.5)
    assert seen > 8


@pytest.mark.parametrize("number", [int, float])
@pytest.mark.parametrize(("box", "mode"), [((11, 20, 40, 45), XYXY), ((11, 20, 29, 25), XYWH)])
def test_flipped_and_resized_box_matches_a_calculation_by_hand(blank, box, mode, number):
    mapper = mapper_of(T.RandomFlip(prob=1.0), T.Resize((75, 150)))
    record = record_of(blank, annotation(*map(number, box), mode=mode, label=3))
    instances = mapper(record)["instances"]
    # x: 100 - 40 = 60 and 100 - 11 = 89, times 1.5; y: 20 and 45, times 1.5
    assert instances.gt_boxes.tensor.tolist() == [[90.0, 30.0, 133.5, 67.5]]
    assert instances.gt_classes.tolist() == [3]
    assert instances.image_size == (75, 150)


def test_evaluation_only_resizes_and_drops_annotations(write_image):
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, :30] = 255
    cfg = tiny_cfg("INPUT.MIN_SIZE_TEST", 80, "INPUT.MAX_SIZE_TEST", 90, config=CROP)
    mapper = DetectionMapper(cfg, is_train=False)
    assert mapper.crop_augmentations is None
    record = record_of(write_image(pixels), annotation(1, 1, 20, 20), height=40, width=60)
    for _ in range(6):
        sample = mapper(record)
        assert sample["image"].shape == (3, 60, 90)  # 80 x 120, reduced by 90 / 120
        assert sample["image"][0, 0, 0] == 255  # not flipped
        assert {"annotations", "instances"}.isdisjoint(sample)
        assert (sample["height"], sample["width"], sample["image_id"]) == (40, 60, 7)


def test_images_without_annotations_are_kept(blank):
    empty = record_of(blank)
    without = {k: v for k, v in empty.items() if k != "annotations"}
    for record in (empty, without):
        instances = mapper_of()(record)["instances"]
        assert instances.gt_boxes.tensor.shape == (0, 4)
        assert instances.gt_classes.shape == (0,)


def test_crowds_are_dropped_and_their_image_is_kept(blank):
    crowd = annotation(1, 1, 20, 20, label=1, iscrowd=1)
    assert len(instances_of(blank, crowd)) == 0
    assert instances_of(blank, crowd, annotation(1, 1, 20, 20, label=2)).gt_classes.tolist() == [2]


@pytest.mark.parametrize(("box", "mode"), [
    ((math.nan, 1, 20, 20), XYXY), ((1, 1, math.inf, 20), XYXY),
    ((5, 5, 0, 10), XYWH), ((5, 5, 10, 0), XYWH),
    ((20, 5, -10, 10), XYWH), ((30, 5, 10, 20), XYXY),
    ((120, 10, 130, 20), XYXY), ((10, -30, 20, -5), XYXY),
    ((1, 2, 3), XYXY), ((None, 1, 20, 20), XYXY),
    ((), XYWH),
])  # fmt: skip
def test_unusable_boxes_are_dropped(blank, box, mode):
    good = annotation(10, 10, 20, 20, label=4)
    instances = instances_of(blank, annotation(*box, mode=mode), good)
    assert instances.gt_boxes.tensor.tolist() == [[10, 10, 20, 20]]
    assert instances.gt_classes.tolist() == [4]


def test_boxes_over_the_border_are_clipped(blank):
    boxes = annotation(-10, -5, 30, 20), annotation(80.5, 30.5, 120, 90)
    clipped = instances_of(blank, *boxes).gt_boxes.tensor
    assert clipped.tolist() == [[0, 0, 30, 20], [80.5, 30.5, 100, 50]]


def test_masks_and_keypoints_are_dropped(blank):
    extra = {"segmentation": [[1, 1, 9, 1, 9, 9]], "keypoints": [5, 5, 2]}
    instances = instances_of(blank, annotation(1, 1, 9, 9, **extra))
    assert set(instances.get_fields()) == {"gt_boxes", "gt_classes"}


def test_record_is_not_modified(blank):
    record = record_of(blank, annotation(11, 20, 29, 25, mode=XYWH))
    del record["height"], record["width"]
    before = copy.deepcopy(record)
    sample = DetectionMapper(tiny_cfg("INPUT.MIN_SIZE_TRAIN", (75,)), is_train=True)(record)
    assert record == before
    assert (sample["height"], sample["width"]) == (50, 100)  # read from the file


def test_pickled_mapper_gives_the_same_samples(blank):
    mapper = DetectionMapper(tiny_cfg("INPUT.MIN_SIZE_TRAIN", (40, 60), config=CROP))
    record = record_of(blank, annotation(10, 10, 60, 40))
    samples = []
    for copied in (mapper, pickle.loads(pickle.dumps(mapper))):
        np.random.seed(3)
        samples.append([copied(record) for _ in range(3)])
    for a, b in zip(*samples, strict=True):
        assert torch.equal(a["image"], b["image"])
        assert torch.equal(a["instances"].gt_boxes.tensor, b["instances"].gt_boxes.tensor)
