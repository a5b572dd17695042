"""Sources of images: kinds, order, formats, and what is refused."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dsrcnn.errors import DataError
from dsrcnn.inference.sources import is_single, readers, source_files, to_rgb


def frames(source, **options):
    return [reader() for reader in readers(source, **options)]


def test_folders_patterns_and_lists_give_their_images_in_order(photos, tmp_path):
    names = lambda source: [str(f.path).removeprefix(f"{photos}/") for f in frames(source)]  # noqa: E731
    assert names(photos) == ["a.png", "b.jpg", "c.png", "d.PNG", "more/e.png"]
    assert names(f"{photos}/*.png") == ["a.png", "c.png"]
    assert names([f"{photos}/c.png", photos / "a.png"]) == ["c.png", "a.png"]
    assert names(f"{photos}/**/*.png") == ["a.png", "c.png", "more/e.png"]
    for source in (photos, f"{photos}/*.png", photos / "a.png"):
        assert source_files(str(source)) == [f.path for f in frames(source)]


def test_hidden_folders_and_folders_with_names_of_images_are_left_out(tmp_path):
    folder = tmp_path / ".cache/photos"  # a hidden folder above is where the user wants it
    for name in (".ipynb_checkpoints", "d.jpg", "more"):
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (4, 3)).save(folder / name / "a.png")
    (folder / "gone.png").symlink_to("nowhere.png")
    names = [Path(path).relative_to(folder).as_posix() for path in source_files(str(folder))]
    assert names == ["d.jpg/a.png", "gone.png", "more/a.png"]


def test_linked_folders_are_read_once_even_if_they_lead_back(tmp_path):
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    for folder in (data, elsewhere):
        folder.mkdir()
        Image.new("RGB", (4, 3)).save(folder / "a.png")
    (data / "linked").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(data)
    names = [Path(path).relative_to(data).as_posix() for path in source_files(str(data))]
    assert names == ["a.png", "linked/a.png"]
    (data / "z").mkdir()
    Image.new("RGB", (4, 3)).save(data / "z/b.png")
    (data / "first").symlink_to(data / "z")
    assert f"{data}/z/b.png" in source_files(str(data))
    assert len(source_files(str(data))) == 3


def test_a_file_whose_name_looks_like_a_pattern_is_a_file(tmp_path):
    path = tmp_path / "a[1].png"
    Image.new("RGB", (4, 3)).save(path)
    assert is_single(str(path))
    assert frames(str(path))[0].image.shape == (3, 4, 3)


PIXELS = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
TENSOR = torch.from_numpy(PIXELS).permute(2, 0, 1)


@pytest.mark.parametrize(("image", "expected"), [
    (PIXELS, PIXELS), (Image.fromarray(PIXELS), PIXELS), (TENSOR, PIXELS), (TENSOR / 255, PIXELS),
    (PIXELS[..., 0], PIXELS[..., [0, 0, 0]]), (PIXELS[..., :1], PIXELS[..., [0, 0, 0]]),
    (np.dstack([PIXELS, PIXELS[..., :1]]), PIXELS), (TENSOR[:1], PIXELS[..., [0, 0, 0]]),
    (Image.fromarray(PIXELS[..., 0]), PIXELS[..., [0, 0, 0]]),
    (PIXELS[::-1, ::-1], PIXELS[::-1, ::-1]),
])  # fmt: skip
def test_images_in_memory_become_rgb_arrays(image, expected):
    assert is_single(image)
    pixels = frames(image)[0].image
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    np.testing.assert_array_equal(pixels, expected)


def test_the_channel_order_is_that_of_arrays_only():
    np.testing.assert_array_equal(to_rgb(PIXELS, bgr=True), PIXELS[..., ::-1])
    np.testing.assert_array_equal(to_rgb(TENSOR, bgr=True), PIXELS)


@pytest.mark.parametrize("kind", ["array", "tensor", "picture", "batch"])
def test_images_whose_memory_is_used_again_are_read_as_they_were(kind):
    buffer = np.zeros((1, 2, 4, 3), np.uint8)
    tensor = torch.zeros(3, 2, 4, dtype=torch.uint8)
    picture = Image.new("RGB", (4, 2))

    def images():
        for value in (10, 20, 30):
            buffer[:] = value
            tensor.fill_(value)
            picture.paste((value,) * 3, (0, 0, 4, 2))
            yield {"array": buffer[0], "tensor": tensor, "picture": picture, "batch": buffer}[kind]

    assert [frame.image.max() for frame in [r() for r in list(readers(images()))]] == [10, 20, 30]


def test_a_damaged_picture_in_memory_does_not_hide_the_others(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(
        tmp_path / "a.png"
    )
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(data[: len(data) // 2])
    first, second = readers([Image.open(tmp_path / "a.png"), PIXELS])
    with pytest.raises(DataError, match="The PIL image cannot be used"):
        first()
    np.testing.assert_array_equal(second().image, PIXELS)


def test_batches_of_arrays_and_tensors_are_several_images():
    for batch in (np.stack([PIXELS, PIXELS + 1]), torch.stack([TENSOR, TENSOR + 1])):
        assert not is_single(batch)
        second = frames(batch)[1].image
        np.testing.assert_array_equal(second, PIXELS + 1)


@pytest.mark.parametrize(("source", "words"), [
    (np.zeros((4, 4, 3)), "values of type float64; give uint8"),
    (np.zeros((4, 4, 2), np.uint8), r"shape \(4, 4, 2\); give an array"),
    (np.zeros((0, 4, 3), np.uint8), r"shape \(0, 4, 3\)"), (np.zeros(3, np.uint8), r"shape \(3,\)"),
    (torch.full((3, 4, 4), 7.0), "values from 7 to 7; give floats from 0 to 1"),
    (torch.full((3, 4, 4), float("nan")), "values from nan to nan"),
    (torch.zeros(3, 4, 4, dtype=torch.int32), "type torch.int32; give uint8"),
    (None, "The source is None; give a path"), (3.5, "source is 3.5"), (True, "source is True"),
    ({"a": 1}, "The source is {'a': 1}"), (object(), "of type object; give a path"),
    ("missing.jpg", "Image missing.jpg does not exist"),
    ("missing.mp4", "Video missing.mp4 does not exist"),
    ("none/*.jpg", "No file matches 'none/\\*.jpg'"),
])  # fmt: skip
def test_other_sources_are_refused(source, words):
    with pytest.raises(DataError, match=words):
        frames(source)


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"has no image \(.jpg, .jpeg"):
        frames(tmp_path)


def test_faults_in_a_list_do_not_hide_the_others(photos, tmp_path):
    todo = list(readers([photos / "a.png", None, tmp_path, photos / "c.png"]))
    assert len(todo) == 4
    for reader, words in ((todo[1], "The source is None"), (todo[2], "has no image")):
        with pytest.raises(DataError, match=words):
            reader()
    assert todo[3]().path == str(photos / "c.png")


def test_a_folder_that_cannot_be_listed_is_reported(photos, monkeypatch):
    closed, scandir = str(photos / "more"), os.scandir

    def refuse(path):
        if str(path) == closed:
            raise PermissionError(13, "Permission denied", closed)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    todo = list(readers(photos))
    assert len(todo) == 5
    for reader in todo[:-1]:
        reader()
    with pytest.raises(DataError, match="more"):
        todo[-1]()
