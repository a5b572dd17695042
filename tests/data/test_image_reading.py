"""Images as they are read: every kind of file, and one message for what is no image."""

import numpy as np
import pytest
import torch
from conftest import tiny_cfg
from PIL import Image

from dsrcnn.data import DetectionMapper
from dsrcnn.errors import DataError


def record_of(file_name, height=50, width=100):
    return {"file_name": file_name, "image_id": 7, "height": height, "width": width}


def read(file_name, **size):
    return DetectionMapper(augmentations=[])({**record_of(file_name, **size), "annotations": []})


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("L", 77, [77, 77, 77]),
        ("LA", (77, 10), [77, 77, 77]),
        ("RGB", (10, 20, 30), [10, 20, 30]),
        ("RGBA", (10, 20, 30, 128), [10, 20, 30]),
        ("1", 1, [255, 255, 255]),
    ],
)
def test_every_kind_of_image_gives_three_channels(write_image, mode, colour, expected):
    name = write_image(Image.new(mode, (100, 50), colour))
    image = read(name)["image"]
    assert image.shape == (3, 50, 100)
    assert image.dtype == torch.uint8
    assert image[:, 0, 0].tolist() == expected


def test_channels_come_in_the_order_of_the_config(write_image):
    name = write_image(Image.new("RGB", (100, 50), (10, 20, 30)))
    for order, expected in (("RGB", [10, 20, 30]), ("BGR", [30, 20, 10])):
        mapper = DetectionMapper(tiny_cfg("INPUT.FORMAT", order), is_train=False)
        assert mapper(record_of(name))["image"][:, 0, 0].tolist() == expected


def test_a_truncated_image_is_named(write_image, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (50, 100, 3), dtype=np.uint8)
    whole = write_image(noise, "whole.jpg")
    broken = tmp_path / "broken.jpg"
    content = (tmp_path / "whole.jpg").read_bytes()
    broken.write_bytes(content[: len(content) // 2])
    read(whole)
    with pytest.raises(DataError, match=r"broken\.jpg cannot be read"):
        read(str(broken))


@pytest.mark.parametrize("content", [b"", b"not an image"])
def test_a_file_that_is_no_image_is_named(tmp_path, content):
    path = tmp_path / "notes.jpg"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"notes\.jpg cannot be read"):
        read(str(path))


def test_a_missing_image_is_named(tmp_path):
    with pytest.raises(DataError, match=r"absent\.png does not exist"):
        read(str(tmp_path / "absent.png"))


def test_a_folder_in_place_of_an_image_is_named(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read(str(tmp_path))


def test_a_wrong_recorded_size_is_named_with_both_sizes(write_image):
    name = write_image(np.zeros((50, 100, 3), np.uint8))
    with pytest.raises(DataError) as caught:
        read(name, height=60, width=90)
    for part in ("image.png", "100x50", "90x60"):
        assert part in str(caught.value)


def test_an_image_turned_by_its_camera_tag_has_the_turned_size(write_image):
    picture = Image.new("RGB", (100, 50))
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown turned by 90 degrees
    name = write_image(picture, "turned.jpg", exif=turned)
    assert read(name, height=100, width=50)["image"].shape == (3, 100, 50)
    with pytest.raises(DataError, match="50x100 pixels, but its record says 100x50"):
        read(name)
