"""Image files as they are read by Pillow or OpenCV, and one message for each kind of fault."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import coco_options, quick_cfg, smooth_image, tiny_cfg
from PIL import Image

from dsrcnn.data import DetectionMapper, build_train_loader
from dsrcnn.data.images import decode_jpeg, image_file_size, read_image
from dsrcnn.data.samplers import Draw
from dsrcnn.errors import DataError

BOTH = pytest.mark.parametrize("use_opencv", [False, True], ids=["Pillow", "OpenCV"])


def read(file_name, use_opencv, **size):
    return read_image({"file_name": str(file_name), **size}, "RGB", use_opencv)


@pytest.mark.parametrize(("mode", "color", "expected"), [
    ("L", 77, [77, 77, 77]), ("LA", (77, 10), [77, 77, 77]),
    ("RGB", (10, 20, 30), [10, 20, 30]), ("RGBA", (10, 20, 30, 128), [10, 20, 30]),
    ("1", 1, [255, 255, 255]),
])  # fmt: skip
@BOTH
def test_images_of_all_modes_have_three_channels(write_image, mode, color, expected, use_opencv):
    image = read(write_image(Image.new(mode, (100, 50), color)), use_opencv)
    assert (image.shape, image.dtype) == ((50, 100, 3), np.uint8)
    assert image[0, 0].tolist() == expected


def test_channels_are_in_the_order_of_the_config(write_image):
    record = {"file_name": write_image(Image.new("RGB", (100, 50), (10, 20, 30)))}
    for order, expected in (("RGB", [10, 20, 30]), ("BGR", [30, 20, 10])):
        image = DetectionMapper(tiny_cfg("INPUT.FORMAT", order), is_train=False)(record)["image"]
        assert image.dtype == torch.uint8
        assert image[:, 0, 0].tolist() == expected


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("orientation", [*range(1, 9)])
def test_opencv_decodes_to_the_pixels_of_pillow(write_image, image_format, mode, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(smooth_image()).convert(mode)
    name = write_image(image, "image.jpg", quality=95, exif=exif)
    expected = read_image({"file_name": name}, image_format)
    decoded = decode_jpeg(name, image_format)
    assert decoded.shape == expected.shape
    # Both use the same library, but its versions may round differently.
    assert np.abs(decoded.astype(int) - expected).max() <= 2


@BOTH
def test_rotated_image_has_its_displayed_size(write_image, use_opencv):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    name = write_image(Image.new("RGB", (100, 50)), "rotated.jpg", exif=exif)
    assert read(name, use_opencv, height=100, width=50).shape == (100, 50, 3)
    with pytest.raises(DataError, match="jpg is 50x100 pixels, but its record says 100x50"):
        read(name, use_opencv, height=50, width=100)


XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-'
    b'syntax-ns#"><rdf:Description rdf:about="" xmlns:tiff="http://ns.adobe.com/tiff/1.0/" '
    b'tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
)


@BOTH
def test_an_orientation_in_xmp_data_counts(write_image, use_opencv):
    pixels = smooth_image()
    name = write_image(Image.fromarray(pixels), "edited.jpg", quality=95, xmp=XMP)
    image = read(name, use_opencv)
    assert np.abs(image.astype(int) - np.rot90(pixels, -1)).max() <= 6
    assert image_file_size(Path(name)) == (60, 80)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff", "webp"])
def test_the_size_of_a_file_is_that_of_its_pixels(write_image, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    name = write_image(Image.new("RGB", (100, 50)), f"image.{suffix}", exif=exif)
    height, width = read(name, False).shape[:2]
    assert (
        image_file_size(Path(name)) == image_file_size(Path(name), decode=True) == (width, height)
    )
    assert (width > height) == (orientation <= 4)


@BOTH
def test_message_names_a_file_that_cannot_be_read(write_image, tmp_path, use_opencv):
    whole = write_image(smooth_image(), "whole.jpg")
    read(whole, use_opencv)
    content = (tmp_path / "whole.jpg").read_bytes()
    for name, data in (("cut.jpg", content[:-100]), ("empty.jpg", b""), ("text.jpg", b"no image")):
        (tmp_path / name).write_bytes(data)
        assert decode_jpeg(tmp_path / name, "RGB") is None
        with pytest.raises(DataError, match=rf"{name} cannot be read \(.*replace the file or"):
            read(tmp_path / name, use_opencv)
    with pytest.raises(DataError, match="cannot be read"):
        read(tmp_path, use_opencv)
    with pytest.raises(DataError, match=r"absent\.png does not exist"):
        read(tmp_path / "absent.png", use_opencv)


def test_opencv_is_used_in_training_only(tmp_path):
    options = [*coco_options(tmp_path), "INPUT.RANDOM_FLIP", "none"]
    plain, fast = (quick_cfg(tmp_path, *options, "INPUT.OPENCV", v) for v in ("False", "True"))
    expected, sample = (build_train_loader(cfg).dataset[Draw(0, 1)] for cfg in (plain, fast))
    assert sample["image"].shape == expected["image"].shape
    boxes = [s["instances"].gt_boxes.tensor for s in (sample, expected)]
    np.testing.assert_array_equal(*boxes)
    train, test = (DetectionMapper(fast, is_train=is_train) for is_train in (True, False))
    assert train.use_opencv
    assert not test.use_opencv
    assert [a.use_opencv for a in train.augmentations] == [True]
    assert [a.use_opencv for a in test.augmentations] == [False]
