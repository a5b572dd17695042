"""Albumentations transforms from a config: boxes, colors, random numbers and messages."""

from collections import Counter

import numpy as np
import pytest
from conftest import coco_options, quick_cfg, triangle
from detectron2.structures import BoxMode

from dsrcnn.config import check_config
from dsrcnn.data import build_train_loader
from dsrcnn.data.samplers import Draw, seeded
from dsrcnn.data.transforms.albumentations import AlbumentationsAdapter
from dsrcnn.errors import ConfigError, DataError

pytest.importorskip("albumentations", reason="pip install 'dsrcnn[albumentations]'")

AFFINE = {"name": "Affine", "rotate": (-45, 45), "scale": (0.6, 1.4), "shear": (-15, 15), "p": 1.0}
NO_OP = {"name": "NoOp"}
KEY = "INPUT.AUG.ALBUMENTATIONS"


def annotation(*box, label=0, mode=BoxMode.XYXY_ABS):
    return {"bbox": list(box), "bbox_mode": mode, "category_id": label}


def black(height=50, width=100):
    return np.zeros((height, width, 3), np.uint8)


@pytest.mark.parametrize("entry", [
    AFFINE,
    {"name": "Perspective", "scale": (0.05, 0.2), "p": 1.0},
    {"name": "RandomSizedBBoxSafeCrop", "height": 80, "width": 100, "p": 1.0},
    {"name": "HorizontalFlip", "p": 0.5},
], ids=lambda entry: entry["name"])  # fmt: skip
def test_transformed_box_contains_the_transformed_object(entry):
    adapter = AlbumentationsAdapter([entry])
    seen = 0
    for _ in range(1000):
        image, box = triangle()
        new, kept = adapter(image, [annotation(*box)])
        ys, xs = np.nonzero(new[..., 0] > 127)
        if len(xs) > 20:
            seen += 1
            x1, y1, x2, y2 = kept[0]["bbox"]
            # It locates pixels by their center in one place and by their corner in another.
            assert x1 - 1.5 <= xs.min() and xs.max() + 1 <= x2 + 1.5  # noqa: PT018
            assert y1 - 1.5 <= ys.min() and ys.max() + 1 <= y2 + 1.5  # noqa: PT018
    assert seen > 500


def test_labels_follow_their_boxes_and_boxes_outside_are_dropped():
    boxes = [
        annotation(10, 10, 20, 20, label=3),
        annotation(70, 10, 80, 20, label=5),
        annotation(99, 0, 120, 9),
    ]
    crop = {"name": "Crop", "x_min": 60, "y_min": 0, "x_max": 95, "y_max": 50}
    image, kept = AlbumentationsAdapter([crop])(black(), boxes)
    assert image.shape == (50, 35, 3)
    assert [a["category_id"] for a in kept] == [5]
    assert kept[0]["bbox"] == pytest.approx([10, 10, 20, 20], abs=1e-4)


def test_boxes_of_other_modes_are_converted_and_clipped():
    boxes = [annotation(-10, 5, 30, 10, mode=BoxMode.XYWH_ABS), annotation(60, 60, 80, 80)]
    _, kept = AlbumentationsAdapter([NO_OP])(black(50, 50), boxes)
    assert [a["bbox"] for a in kept] == [pytest.approx([0, 5, 20, 15])]


def test_bgr_images_are_passed_as_rgb():
    red = black(4, 4)
    red[..., 2] = 200
    to_gray = {"name": "ToGray", "method": "weighted_average", "p": 1.0}
    gray, _ = AlbumentationsAdapter([to_gray], image_format="BGR")(red, [])
    np.testing.assert_allclose(gray, 0.299 * 200, atol=1)
    same, _ = AlbumentationsAdapter([NO_OP], image_format="BGR")(red, [])
    np.testing.assert_array_equal(same, red)


def test_random_numbers_follow_from_the_seed_of_numpy():
    image = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    choice = {"name": "OneOf", "transforms": [{"name": "CLAHE"}, {"name": "GaussNoise"}], "p": 0.9}

    def draw(seed):
        adapter = AlbumentationsAdapter([AFFINE, choice])
        with seeded(seed):
            new, kept = adapter(image, [annotation(10, 10, 40, 40)])
        return new.tolist(), kept[0]["bbox"]

    assert draw(1) == draw(1)
    assert draw(1)[1] != draw(2)[1]


def test_transforms_happen_independently_of_each_other():
    """The draws of a horizontal and a vertical flip give all four combinations."""
    image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    flips = [{"name": name, "p": 0.5} for name in ("HorizontalFlip", "VerticalFlip")]
    adapter = AlbumentationsAdapter(flips)
    counts = Counter()
    for seed in range(200):
        with seeded(seed):
            counts[adapter(image, [])[0].tobytes()] += 1
    expected = [image, image[:, ::-1], image[::-1], image[::-1, ::-1]]
    assert set(counts) == {x.tobytes() for x in expected}
    assert min(counts.values()) > 25  # of 50 in the mean


def test_training_images_go_through_the_transforms_of_the_config(tmp_path):
    invert = "[{'name': 'InvertImg', 'p': 1.0}, {'name': 'Transpose', 'p': 1.0}]"
    options = [*coco_options(tmp_path), "INPUT.RANDOM_FLIP", "none"]
    plain = build_train_loader(quick_cfg(tmp_path, *options)).dataset[Draw(0, 1)]
    sample = build_train_loader(quick_cfg(tmp_path, *options, KEY, invert)).dataset[Draw(0, 1)]
    expected = 255 - plain["image"].transpose(1, 2)
    assert sample["image"].shape == expected.shape
    assert (sample["image"].int() - expected.int()).abs().float().mean() < 2  # resized differently
    boxes = plain["instances"].gt_boxes.tensor[:, [1, 0, 3, 2]]
    np.testing.assert_allclose(sample["instances"].gt_boxes.tensor, boxes, atol=1e-3)


@pytest.mark.parametrize(("entry", "message"), [
    ("CLAHE", r"has the entry 'CLAHE'; write a name with its arguments"),
    ({"name": "Colorjiter"}, r"no transform 'Colorjiter'; did you mean ColorJitter"),
    ({"name": "CLAHE", "clip": 3}, r"CLAHE cannot be built: .*'clip' are not valid"),
    ({"name": "CLAHE", "clip_limit": "x"}, r"CLAHE cannot be built: "),
    ({"name": "OneOf", "transforms": [{"name": "Nothing"}]}, r"no transform 'Nothing'"),
    ({"name": "OneOf", "transforms": 5}, r"OneOf has transforms 5; write a list"),
    ({"name": "BasicTransform"}, r"BasicTransform cannot be built"),
    ({"name": "BboxParams", "format": "coco"}, r"no transform 'BboxParams'"),
])  # fmt: skip
def test_message_names_a_wrong_entry(entry, message):
    with pytest.raises(ConfigError, match=message):
        AlbumentationsAdapter([entry])


def test_message_names_the_image_a_transform_fails_on(tmp_path):
    crop = "[{'name': 'RandomCrop', 'height': 5000, 'width': 5000}]"
    cfg = quick_cfg(tmp_path, *coco_options(tmp_path), KEY, crop)
    with pytest.raises(DataError, match=r"Image .*\.\w+: INPUT.AUG.ALBUMENTATIONS fails on an"):
        build_train_loader(cfg).dataset[Draw(0, 1)]


def test_normalizing_is_an_error():
    with pytest.raises(DataError, match=r"of float32 instead of \(H, W, 3\) uint8"):
        AlbumentationsAdapter([{"name": "Normalize"}])(black(9, 9), [])


def test_message_names_the_missing_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "albumentations", None)
    with pytest.raises(ConfigError, match=r"pip install 'dsrcnn\[albumentations\]'"):
        AlbumentationsAdapter([{"name": "CLAHE"}])


def test_saved_config_keeps_the_transforms(tmp_path):
    cfg = quick_cfg(tmp_path, KEY, "[{'name': 'CLAHE', 'p': 0.5}]")
    check_config(cfg)
    path = tmp_path / "saved.yaml"
    path.write_text(cfg.dump())
    loaded = quick_cfg(tmp_path)
    loaded.merge_from_file(str(path))
    assert list(loaded.INPUT.AUG.ALBUMENTATIONS) == [{"name": "CLAHE", "p": 0.5}]
