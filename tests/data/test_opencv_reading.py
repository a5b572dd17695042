"""OpenCV in place of Pillow: the same pixels, nearly the same sizes, the same messages."""

import multiprocessing

import cv2
import numpy as np
import pytest
from conftest import coco_options, quick_cfg
from detectron2.data import transforms as T
from PIL import Image

from dsrcnn.data import DetectionMapper, build_train_loader
from dsrcnn.data.mapper import ResizeByOpenCV, decode_jpeg, read_image, use_one_thread
from dsrcnn.data.samplers import Draw
from dsrcnn.errors import DataError


def smooth(height=60, width=80):
    """An image without edges, on which interpolations differ little."""
    y, x = np.mgrid[:height, :width]
    channels = [x * 200 / width, y * 200 / height, (x + y) * 200 / (width + height)]
    return np.stack(channels, axis=2).astype(np.uint8)


@pytest.fixture
def jpeg(tmp_path):
    path = tmp_path / "image.jpg"
    Image.fromarray(smooth()).save(path, quality=95)
    return path


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pixels_are_pillows(tmp_path, image_format, mode):
    path = tmp_path / "image.jpg"
    Image.fromarray(smooth()).convert(mode).save(path)
    expected = read_image({"file_name": str(path)}, image_format)
    found = decode_jpeg(path, image_format)
    # The same library decodes in both; a version of it may round otherwise.
    assert np.abs(found.astype(int) - expected).max() <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_their_exif_data_say(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "image.jpg"
    Image.fromarray(smooth()).save(path, exif=exif)
    expected = read_image({"file_name": str(path)}, "RGB")
    found = decode_jpeg(path, "RGB")
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).max() <= 2


def test_what_is_no_whole_jpeg_is_left_to_pillow(tmp_path, jpeg):
    png = tmp_path / "image.png"
    Image.fromarray(smooth()).save(png)
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(jpeg.read_bytes()[:-100])
    for path in (png, cut, tmp_path / "missing.jpg"):
        assert decode_jpeg(path, "RGB") is None
    np.testing.assert_array_equal(read_image({"file_name": str(png)}, "RGB", True), smooth())
    with pytest.raises(DataError, match=r"cut.jpg cannot be read \(.*truncated"):
        read_image({"file_name": str(cut)}, "RGB", True)
    with pytest.raises(DataError, match=r"missing.jpg does not exist"):
        read_image({"file_name": str(tmp_path / "missing.jpg")}, "RGB", True)


def test_another_size_than_recorded_is_found(jpeg):
    with pytest.raises(DataError, match="is 80x60 pixels, but its record says 90x60"):
        read_image({"file_name": str(jpeg), "height": 60, "width": 90}, "RGB", True)


@pytest.mark.parametrize("side", [24, 40, 90, 150])
def test_resizing_has_pillows_sizes_and_nearly_its_pixels(side):
    plain = T.ResizeShortestEdge([side], 200, "choice")
    expected, found = T.AugInput(smooth()), T.AugInput(smooth())
    boxes = np.array([[10.0, 20, 40, 50]])
    expected_boxes = plain(expected).apply_box(boxes)
    np.testing.assert_array_equal(ResizeByOpenCV(plain)(found).apply_box(boxes), expected_boxes)
    assert found.image.shape == expected.image.shape
    assert np.abs(found.image.astype(int) - expected.image).max() <= 6


def test_the_option_is_for_training_only(tmp_path):
    options = [*coco_options(tmp_path), "INPUT.RANDOM_FLIP", "none"]
    plain, fast = (quick_cfg(tmp_path, *options, "INPUT.OPENCV", v) for v in ("False", "True"))
    expected, found = (build_train_loader(cfg).dataset[Draw(0, 1)] for cfg in (plain, fast))
    assert found["image"].shape == expected["image"].shape
    boxes = [sample["instances"].gt_boxes.tensor for sample in (found, expected)]
    np.testing.assert_array_equal(*boxes)
    assert DetectionMapper(fast, is_train=True).by_opencv
    assert not DetectionMapper(fast, is_train=False).by_opencv
    kinds = {type(a) for a in DetectionMapper(fast, is_train=False).augmentations}
    assert kinds == {T.ResizeShortestEdge}


def test_a_worker_does_not_wait_for_threads_of_its_parent():
    cv2.resize(np.zeros((2000, 2000, 3), np.uint8), (1500, 1500), interpolation=cv2.INTER_AREA)
    worker = multiprocessing.get_context("fork").Process(target=use_one_thread, args=(0,))
    worker.start()
    worker.join(timeout=30)
    alive = worker.is_alive()
    worker.kill()
    assert not alive
