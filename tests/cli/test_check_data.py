"""``dsrcnn check-data``: every kind of fault is counted and named; the exit status is 1."""

import json
import os
import re
import shutil

import cv2
import numpy as np
import pytest
from conftest import refusal, write_coco, write_voc
from PIL import Image

from dsrcnn.cli.main import main


def write_photo(path, seed, size=(64, 96), **options):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)


@pytest.fixture
def folder(tmp_path):
    """Two splits of three images of 96 x 64 pixels, two boxes each, no two images the same."""
    for number, split in enumerate(("train", "val")):
        annotations = tmp_path / f"annotations/instances_{split}.json"
        write_coco(annotations, tmp_path / "images" / split, count=3, seed=number)
    return tmp_path


def check(folder, capsys, *options):
    """Return exit status, numbers of train and val by row, and the text."""
    status = main(["check-data", str(folder), *options])
    text = capsys.readouterr().out
    rows = re.findall(r"^(\S.*?) +(\d+) +(\d+)$", text, re.MULTILINE)
    return status, {name.strip(): (int(a), int(b)) for name, a, b in rows}, text


def edit(folder, change, split="train"):
    path = folder / f"annotations/instances_{split}.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def set_box(*box):
    return lambda content: content["annotations"][0].update(bbox=list(box))


def test_valid_data_are_ready_to_train(folder, capsys):
    status, rows, text = check(folder, capsys)
    assert status == 0
    assert "Ready to train." in text
    assert rows["images"] == (3, 3)
    assert rows["usable boxes"] == (6, 6)
    assert rows["left"] == rows["right"] == (3, 3)
    # 30 x 30 and 40 x 30 pixels, enlarged by 800 / 64
    assert rows["256 and more"] == (6, 6)
    assert check(folder, capsys, "--min-size", "64")[1]["16 to 32"] == (3, 3)


@pytest.mark.parametrize(("options", "words"), [
    (["SOLVER.EPOCHS.MAX", "2", "SOLVER.IMS_PER_BATCH", "4"], "epoch of 3 images is less than one"),
    (["SOLVER.IMS_PER_BATCH", "5", "SOLVER.ACCUMULATE", "2"], "must be a multiple of 2"),
])  # fmt: skip
def test_data_are_not_ready_for_a_config_that_training_refuses(folder, capsys, options, words):
    words_of = ["check-data", str(folder), "--config-file", "quick/sparse_rcnn_shapes", *options]
    assert words in refusal(capsys, *words_of)
    assert "Ready to train" not in capsys.readouterr().out


def test_splits_need_a_folder(folder, capsys):
    words = ["DATASETS.CUSTOM.TEST_JSON", folder / "annotations/instances_val.json"]
    words += ["DATASETS.CUSTOM.TEST_IMAGES", folder / "images/val", "--splits", "val"]
    assert "--splits is val, but the config names json files" in refusal(
        capsys, "check-data", "--config-file", "quick/sparse_rcnn_shapes", *map(str, words)
    )


def test_test_data_are_checked_without_training_data(folder, capsys):
    words = ["DATASETS.CUSTOM.TEST_JSON", folder / "annotations/instances_val.json"]
    words += ["DATASETS.CUSTOM.TEST_IMAGES", folder / "images/val", "DATASETS.CUSTOM.NAME", "x"]
    config = ["--config-file", "quick/sparse_rcnn_shapes"]
    assert main(["check-data", *config, *map(str, words)]) == 0
    assert "No faults. The split to train on was not checked." in capsys.readouterr().out


@pytest.mark.parametrize(("change", "kind", "shown"), [
    (set_box(5, 5, 0, 9), "box without area", "[5, 5, 0, 9]"),
    (set_box(float("nan"), 1, 5, 5), "box not finite", "nan"),
    (set_box(200, 1, 5, 5), "box outside", "[200, 1, 5, 5]"),
    (set_box(5, 5, 30), "annotation broken", "[5, 5, 30]"),
    (lambda c: c["annotations"][0].update(category_id=9), "unknown class", "1 has category 9"),
    (lambda c: c["images"][1].update(id=1), "duplicate id", "several images have the id"),
    (lambda c: c["annotations"][1].update(id=1), "duplicate id", "several annotations have the id"),
    (lambda c: c["annotations"][0].update(image_id=9), "annotation broken", "to image 9"),
    (lambda c: c["images"][0].update(height=60), "image size differs", "96x64, recorded 96x60"),
])  # fmt: skip
def test_faulty_annotations_are_reported(folder, capsys, change, kind, shown):
    edit(folder, change)
    status, rows, text = check(folder, capsys)
    assert status == 1
    assert "Some faults should be fixed." in text
    assert rows[kind] == (1, 0)
    assert shown in next(x for x in text.splitlines() if x.startswith(f"train, {kind}"))


@pytest.mark.parametrize(("damage", "kind"), [
    (lambda path: path.unlink(), "image missing"),
    (lambda path: path.write_bytes(path.read_bytes()[:900]), "image broken"),
    (lambda path: path.write_bytes(b"no image"), "image broken"),
    (lambda path: shutil.copy(path.with_name("2.jpg"), path), "duplicate image"),
    (lambda path: shutil.copy(path.parents[1] / "val/2.jpg", path), "image in two splits"),
])  # fmt: skip
def test_faulty_images_are_reported(folder, capsys, damage, kind):
    damage(folder / "images/train/1.jpg")
    status, rows, text = check(folder, capsys)
    assert status == 1
    assert sum(rows[kind]) == 1
    assert re.search(rf"^\w+, {kind}: .*1\.jpg", text, re.MULTILINE)


@pytest.mark.parametrize(("change", "kind"), [
    (set_box(-9, 5, 30, 30), "box over the border"),
    (set_box(5, 5, 0.2, 30), "tiny box"),
    (lambda c: c["annotations"][0].update(iscrowd=1), "crowd"),
    (lambda c: c["annotations"].__delitem__(slice(0, 2)), "image without boxes"),
])  # fmt: skip
def test_notes_are_no_faults(folder, capsys, change, kind):
    edit(folder, change)
    status, rows, _ = check(folder, capsys)
    assert status == 0
    assert rows[kind] == (1, 0)


def test_examples_are_limited_and_splits_chosen(folder, capsys):
    for number in (1, 2, 3):
        (folder / f"images/train/{number}.jpg").unlink()
    status, _, text = check(folder, capsys, "--splits", "train", "--examples", "2")
    assert status == 1
    assert text.count("train, image missing:") == 3
    assert "image missing: and 1 more" in text
    assert "val" not in text


def test_a_sheet_is_drawn_of_what_is_usable(folder, capsys):
    (folder / "images/train/1.jpg").unlink()
    edit(folder, set_box(None, 1, 5, 5), "val")
    check(folder, capsys, "--output", str(folder / "sheets/cells.png"))
    sheet = cv2.imread(str(folder / "sheets/cells.png"))
    assert sheet.shape[0] > 600  # two rows
    assert sheet.shape[1] > 4 * 400


def test_a_sheet_names_files_whose_names_are_no_text(tmp_path, capsys):
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
    name = os.fsdecode(b"m\xfcll")  # of an archive from Windows
    write_photo(tmp_path / f"images/{name}.png", 0)
    (tmp_path / f"labels/{name}.txt").write_text("0 0.5 0.5 0.4 0.4\n")
    (tmp_path / "data.yaml").write_text("train: images\nnames: [cell]\n")
    assert check(tmp_path, capsys, "--output", str(tmp_path / "cells.png"))[0] == 0
    assert cv2.imread(str(tmp_path / "cells.png")) is not None


def test_a_yolo_folder_is_checked(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    (tmp_path / "data.yaml").write_text("train: images\nnames: [cell]\n")
    for number in range(3):
        write_photo(tmp_path / f"images/{number}.jpg", number)
    (tmp_path / "labels/0.txt").write_text("0 0.5 0.5 0.2 0.2\n1 0.5 0.5 0.2 0.2\n0 0.5\n")
    (tmp_path / "images/2.jpg").write_bytes(b"broken")
    (tmp_path / "labels/7.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    status, _, text = check(tmp_path, capsys)
    assert status == 1
    for kind, shown in (
        ("unknown class", "line 2: class 1"),
        ("annotation broken", "line 3: '0 0.5'"),
        ("image broken", "2.jpg"),
        ("image without boxes", "1.jpg"),
        ("label without image", "7.txt; read are images with the endings .jpg, .jpeg,"),
    ):
        assert re.search(rf"^train, {kind}: .*{re.escape(shown)}", text, re.MULTILINE), kind
    assert re.search(r"^image missing +0$", text, re.MULTILINE)
    assert re.search(r"^image broken +1$", text, re.MULTILINE)


def test_splits_with_different_classes_are_reported(folder, capsys):
    def swap(content):
        first, second = content["categories"]
        first["name"], second["name"] = second["name"], first["name"]

    edit(folder, swap, "val")
    status, rows, text = check(folder, capsys)
    assert status == 1
    assert rows["classes differ"] == (0, 1)
    assert rows["left"] == rows["right"] == (3, 3)  # by name
    assert "right, left; train has left, right" in text


def test_a_class_that_a_split_lacks_has_a_dash(folder, capsys):
    edit(folder, lambda c: c["categories"].append({"id": 9, "name": "new"}), "val")
    status, _, text = check(folder, capsys, "--output", str(folder / "sheet.png"))
    assert status == 1
    assert re.search(r"^new +- +0$", text, re.MULTILINE)


def test_rotated_photos_are_no_fault(folder, capsys):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = sorted((folder / "images/train").glob("*.jpg"))[0]
    write_photo(path, 99, (96, 64), exif=exif)
    assert check(folder, capsys)[0] == 0


def test_the_union_of_two_voc_splits_is_not_checked(tmp_path, capsys):
    splits = {"train": ["0"], "val": ["1"], "trainval": ["0", "1"]}
    write_voc(tmp_path, {key: [("cell", 5, 5, 40, 40)] for key in "01"}, splits)
    status, rows, _ = check(tmp_path, capsys)
    assert (status, rows["images"]) == (0, (1, 1))
