"""Albumentations' transforms from a config: boxes, colours, random numbers and messages."""

import cv2
import numpy as np
import pytest
from conftest import coco_options, quick_cfg
from detectron2.structures import BoxMode

from dsrcnn.config import check_config
from dsrcnn.data import build_train_loader
from dsrcnn.data.samplers import Draw, seeded
from dsrcnn.data.transforms import AlbumentationsAdapter
from dsrcnn.errors import ConfigError, DataError

pytest.importorskip("albumentations", reason="pip install 'dsrcnn[albumentations]'")

AFFINE = {"name": "Affine", "rotate": (-45, 45), "scale": (0.6, 1.4), "shear": (-15, 15), "p": 1.0}


def annotation(x1, y1, x2, y2, label=0):
    return {"bbox": [x1, y1, x2, y2], "bbox_mode": BoxMode.XYXY_ABS, "category_id": label}


@pytest.mark.parametrize(
    "entry",
    [
        AFFINE,
        {"name": "Perspective", "scale": (0.05, 0.2), "p": 1.0},
        {"name": "RandomSizedBBoxSafeCrop", "height": 80, "width": 100, "p": 1.0},
        {"name": "HorizontalFlip", "p": 0.5},
    ],
    ids=lambda entry: entry["name"],
)
def test_a_transformed_box_contains_the_transformed_object(entry):
    np.random.seed(0)
    adapter = AlbumentationsAdapter([entry])
    seen = 0
    for _ in range(1000):
        image = np.zeros((90, 120, 3), np.uint8)
        cv2.fillPoly(image, [np.random.randint([20, 20], [100, 70], (3, 2))], (255,) * 3)
        ys, xs = np.nonzero(image[..., 0])
        box = xs.min(), ys.min(), xs.max() + 1, ys.max() + 1
        new, kept = adapter(image, [annotation(*map(float, box))])
        ys, xs = np.nonzero(new[..., 0] > 127)
        if len(xs) > 20:
            seen += 1
            x1, y1, x2, y2 = kept[0]["bbox"]
            # It counts pixels from their middle in one place and from their corner in another.
            assert x1 - 1.5 <= xs.min() and xs.max() + 1 <= x2 + 1.5  # noqa: PT018
            assert y1 - 1.5 <= ys.min() and ys.max() + 1 <= y2 + 1.5  # noqa: PT018
    assert seen > 500


def test_classes_stay_with_their_boxes_and_boxes_outside_go():
    boxes = [
        annotation(10, 10, 20, 20, 3),
        annotation(70, 10, 80, 20, 5),
        annotation(99, 0, 120, 9),
    ]
    crop = {"name": "Crop", "x_min": 60, "y_min": 0, "x_max": 95, "y_max": 50}
    image, kept = AlbumentationsAdapter([crop])(np.zeros((50, 100, 3), np.uint8), boxes)
    assert image.shape == (50, 35, 3)
    assert [a["category_id"] for a in kept] == [5]
    assert kept[0]["bbox"] == pytest.approx([10, 10, 20, 20], abs=1e-4)


def test_boxes_of_other_modes_and_beyond_the_border_are_read():
    wide = {"bbox": [-10, 5, 30, 10], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
    outside = annotation(60, 60, 80, 80)
    _, kept = AlbumentationsAdapter([{"name": "NoOp"}])(
        np.zeros((50, 50, 3), np.uint8), [wide, outside]
    )
    assert [a["bbox"] for a in kept] == [pytest.approx([0, 5, 20, 15])]


def test_bgr_images_are_shown_to_the_library_as_rgb():
    red = np.zeros((4, 4, 3), np.uint8)
    red[..., 2] = 200  # in BGR
    to_gray = {"name": "ToGray", "method": "weighted_average", "p": 1.0}
    gray, _ = AlbumentationsAdapter([to_gray], image_format="BGR")(red, [])
    np.testing.assert_allclose(gray, 0.299 * 200, atol=1)
    kept, _ = AlbumentationsAdapter([{"name": "NoOp"}], image_format="BGR")(red, [])
    np.testing.assert_array_equal(kept, red)


def test_random_numbers_follow_from_numpys_seed_alone():
    image = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    choice = {"name": "OneOf", "transforms": [{"name": "CLAHE"}, {"name": "GaussNoise"}], "p": 0.9}

    def draw(seed):
        adapter = AlbumentationsAdapter([AFFINE, choice])
        with seeded(seed):
            new, kept = adapter(image, [annotation(10, 10, 40, 40)])
        return new, kept[0]["bbox"]

    first, again, other = draw(1), draw(1), draw(2)
    assert (first[0] == again[0]).all()
    assert first[1] == again[1]
    assert first[1] != other[1]


def test_training_images_go_through_the_transforms_of_the_config(tmp_path):
    invert = "[{'name': 'InvertImg', 'p': 1.0}, {'name': 'Transpose', 'p': 1.0}]"
    options = [*coco_options(tmp_path), "INPUT.RANDOM_FLIP", "none"]
    plain = build_train_loader(quick_cfg(tmp_path, *options)).dataset[Draw(0, 1)]
    cfg = quick_cfg(tmp_path, *options, "INPUT.AUG.ALBUMENTATIONS", invert)
    found = build_train_loader(cfg).dataset[Draw(0, 1)]
    expected = 255 - plain["image"].transpose(1, 2)
    assert found["image"].shape == expected.shape
    assert (found["image"].int() - expected.int()).abs().float().mean() < 2  # resized differently
    boxes = plain["instances"].gt_boxes.tensor[:, [1, 0, 3, 2]]
    np.testing.assert_allclose(found["instances"].gt_boxes.tensor, boxes, atol=1e-3)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("CLAHE", r"has the entry 'CLAHE'; write a name with its arguments"),
        ({"name": "Colorjiter"}, r"no transform 'Colorjiter'; did you mean ColorJitter"),
        ({"name": "CLAHE", "clip": 3}, r"CLAHE cannot be built: .*'clip' are not valid"),
        ({"name": "CLAHE", "clip_limit": "x"}, r"CLAHE cannot be built: "),
        ({"name": "OneOf", "transforms": [{"name": "Nothing"}]}, r"no transform 'Nothing'"),
    ],
)
def test_a_wrong_entry_is_named(entry, message):
    with pytest.raises(ConfigError, match=message):
        AlbumentationsAdapter([entry])


def test_a_transform_that_fails_names_the_image_and_its_size(tmp_path):
    option = "[{'name': 'RandomCrop', 'height': 5000, 'width': 5000}]"
    cfg = quick_cfg(tmp_path, *coco_options(tmp_path), "INPUT.AUG.ALBUMENTATIONS", option)
    with pytest.raises(DataError, match=r"Image .*\.\w+: INPUT.AUG.ALBUMENTATIONS fails on an"):
        build_train_loader(cfg).dataset[Draw(0, 1)]


def test_normalized_images_are_refused():
    with pytest.raises(DataError, match=r"of float32 instead of \(H, W, 3\) uint8"):
        AlbumentationsAdapter([{"name": "Normalize"}])(np.zeros((9, 9, 3), np.uint8), [])


def test_a_missing_library_is_one_message(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "albumentations", None)
    with pytest.raises(ConfigError, match=r"pip install 'dsrcnn\[albumentations\]'"):
        AlbumentationsAdapter([{"name": "CLAHE"}])


def test_the_list_survives_a_saved_config(tmp_path):
    option = "[{'name': 'CLAHE', 'p': 0.5}]"
    cfg = quick_cfg(tmp_path, "INPUT.AUG.ALBUMENTATIONS", option)
    check_config(cfg)
    path = tmp_path / "saved.yaml"
    path.write_text(cfg.dump())
    again = quick_cfg(tmp_path)
    again.merge_from_file(str(path))
    assert list(again.INPUT.AUG.ALBUMENTATIONS) == [{"name": "CLAHE", "p": 0.5}]
