"""What training says of its data before it builds a model: test sets, names, repeated images."""

import json
import sys

import numpy as np
import pytest
from conftest import SMALL, quick_cfg, refusal, run_program
from data_cases import check, coco_content, write_coco, write_voc, write_yolo
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image

from dsrcnn.analysis.augmented import draw_augmented
from dsrcnn.data.build import load_records, training_records
from dsrcnn.data.datasets import validate
from dsrcnn.engine.setup import check_datasets
from dsrcnn.errors import ConfigError, DataError, DsrcnnError

FOLDER = "DATASETS.CUSTOM.FOLDER"


@pytest.fixture(autouse=True)
def _forget_warnings(monkeypatch):
    monkeypatch.setattr(validate, "_WARNED", set())


def checked(path, *opts):
    cfg = quick_cfg(path / "out", *opts)
    check_datasets(cfg, eval_only=False)
    return cfg


def write_validation(folder, change):
    """Change the json of the test split only."""
    content = coco_content()
    change(content)
    (folder / "annotations/instances_val.json").write_text(json.dumps(content))


@pytest.mark.parametrize(("change", "phrase"), [
    (lambda c: c["images"][0].update(file_name="absent.jpg"), "1 of 3 images .* do not exist"),
    (lambda c: c["annotations"][0].update(bbox="x"), r"annotations\[0\] has bbox 'x'"),
    (lambda c: c.update(images=[], annotations=[]), "lists no images"),
])  # fmt: skip
def test_broken_test_split_is_refused_before_training(tmp_path, change, phrase):
    folder = write_coco(tmp_path / "cells", coco_content())
    write_validation(folder, change)
    with pytest.raises(DataError, match=phrase):
        checked(tmp_path, FOLDER, str(folder))


def test_command_refuses_a_broken_test_split(tmp_path, capsys):
    folder = write_coco(tmp_path / "cells", coco_content())
    (folder / "images/val/2.jpg").unlink()
    words = ["--config-file", "quick/sparse_rcnn_shapes", *SMALL, "OUTPUT_DIR", tmp_path / "out"]
    assert "1 of 3 images" in refusal(capsys, "train", *words, FOLDER, folder)
    assert not (tmp_path / "out/model.txt").exists()


def record(number, **values):
    """A record of an image that exists."""
    box = {"bbox": [1, 1, 20, 20], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    image = {"file_name": f"shapes://train/{number}", "image_id": number}
    return {**image, "annotations": [box], **values}


@pytest.mark.parametrize(("metadata", "records", "phrase"), [
    ({}, [record(1)], "has no class names"),
    ({"thing_classes": ["a"]}, [record(1), record(2, image_id=1)], "have the image_id 1"),
    ({"thing_classes": ["a"], "evaluator_type": "odd"}, [record(1)], "evaluator_type 'odd'"),
    ({"thing_classes": ["a"], "evaluator_type": ["coco"]}, [record(1)], r"type \['coco'\]"),
    *(({"thing_classes": ["a"], "evaluator_type": kind}, [record(1)], f"needs the metadata {key}")
      for kind, key in (("pascal_voc", "dirname, split, year"), ("lvis", "json_file"),
                        ("crowdhuman", "json_file"))),
])  # fmt: skip
def test_unusable_test_set_of_a_program_is_refused(tmp_path, metadata, records, phrase):
    DatasetCatalog.register("theirs", lambda: records)
    MetadataCatalog.get("theirs").set(**metadata)
    cfg = quick_cfg(tmp_path)
    cfg.defrost()
    cfg.DATASETS.TEST = ("theirs",)
    with pytest.raises(DataError, match=phrase):
        check_datasets(cfg, eval_only=False)


def test_early_stopping_needs_labels(tmp_path):
    folder = write_coco(tmp_path / "cells", coco_content())
    write_validation(folder, lambda c: c.pop("annotations"))
    checked(tmp_path, FOLDER, str(folder))
    with pytest.raises(ConfigError, match="PATIENCE is 2, but test set cells_test has no labels"):
        checked(tmp_path, FOLDER, str(folder), "TEST.BEST.PATIENCE", "2")
    options = ["TEST.BEST.PATIENCE", "2", "DATASETS.CUSTOM.TEST_SPLIT", ""]
    with pytest.raises(ConfigError, match=r"PATIENCE is 2, but DATASETS.TEST is empty"):
        checked(tmp_path, FOLDER, str(folder), *options)


@pytest.mark.parametrize("name", ["coco_2017", "shapes", "voc_2007"])
def test_folders_may_have_the_names_of_known_datasets(tmp_path, capsys, name):
    folder = write_yolo(tmp_path / name)
    assert check(folder, capsys)[0] == 0
    for _ in range(2):  # a notebook cell may run twice
        cfg = checked(tmp_path, FOLDER, str(folder))
        assert (f"{name}_custom_train",) == cfg.DATASETS.TRAIN
    with pytest.raises(DataError, match="registered already"):
        quick_cfg(tmp_path, FOLDER, str(folder), "DATASETS.CUSTOM.NAME", name)


def warnings_of_training(path, messages, folder, *opts):
    training_records(checked(path, FOLDER, str(folder), *opts))
    return "\n".join(messages())


def test_training_warns_of_an_image_that_is_listed_twice(tmp_path, messages):
    content = coco_content()
    content["images"][1]["file_name"] = "1.jpg"
    folder = write_coco(tmp_path / "cells", content)
    text = warnings_of_training(tmp_path, messages, folder)
    assert "1 images are listed more than once (duplicate image)" in text
    assert "1.jpg 2 times" in text


def test_training_warns_of_a_list_with_repetition(tmp_path, messages):
    folder = write_yolo(tmp_path / "cells")
    names = [str(folder / f"images/train/{n}.jpg") for n in (1, 2, 2)]
    (folder / "train.txt").write_text("\n".join(names))
    (folder / "data.yaml").write_text("train: train.txt\nval: images/val\nnames: [left, right]")
    assert "2.jpg 2 times" in warnings_of_training(tmp_path, messages, folder)


def test_images_that_share_a_label_file_are_named(tmp_path, messages, capsys):
    folder = write_yolo(tmp_path / "cells")
    Image.new("RGB", (96, 80)).save(folder / "images/train/1.jpeg")
    status, text = check(folder, capsys)
    assert status == 1
    assert "train, duplicate image: " in text
    text = warnings_of_training(tmp_path, messages, folder)
    assert "1 images share the label file of another (duplicate image)" in text


def test_training_warns_of_its_images_in_the_test_set(tmp_path, messages):
    folder = write_yolo(tmp_path / "cells")
    text = warnings_of_training(tmp_path, messages, folder)
    assert "two splits" not in text
    options = ["DATASETS.CUSTOM.TEST_SPLIT", "train"]
    text = warnings_of_training(tmp_path, messages, folder, *options)
    assert "cells_2_test: 3 images are training images, too (image in two splits)" in text


def test_unusable_boxes_of_a_program_are_named_and_its_records_stay(messages):
    records = [record(1, height=64, width=96), record(2, height=64, width=96)]
    records[0]["annotations"] *= 2
    far = {**records[0]["annotations"][0], "bbox": np.array([200, 1, 220, 20])}
    records[1]["annotations"] = [far, *records[1]["annotations"]]
    DatasetCatalog.register("theirs", lambda: records)
    MetadataCatalog.get("theirs").thing_classes = ["a"]
    loaded = load_records("theirs", for_training=True, find_images=False)
    assert [len(r["annotations"]) for r in loaded] == [2, 1]
    assert [len(r["annotations"]) for r in records] == [2, 2]
    assert "1 boxes cannot be used" in messages()[0]


def test_voc_images_are_those_of_the_list_and_inside_the_folder(tmp_path, messages):
    folder = write_voc(tmp_path / "cells")
    for number in "1234":
        Image.new("RGB", (96, 64)).save(folder / f"JPEGImages/{number}.jpg")
    Image.new("RGB", (96, 64)).save(tmp_path / "secret.jpg")

    path = folder / "Annotations/1.xml"
    objects = path.read_text().removeprefix("<annotation>")

    def first(name):
        path.write_text(f"<annotation><filename>{name}</filename>{objects}")
        cfg = quick_cfg(tmp_path, FOLDER, str(folder))
        return training_records(cfg)[0]["file_name"].removeprefix(f"{folder}/JPEGImages/")

    assert first("4.jpg") == first("../../secret.jpg") == first("/secret.jpg") == "1.jpg"
    assert "another name" not in "\n".join(messages())
    (folder / "JPEGImages/1.jpg").unlink()
    assert first("4.jpg") == "4.jpg"
    assert "1 annotation files name an image of another name, which is used: 1.xml names 4.jpg" in (
        "\n".join(messages())
    )
    for name in ("../../secret.jpg", str(tmp_path / "secret.jpg")):
        with pytest.raises(DataError, match=r"do not exist: .*JPEGImages/1.jpg"):
            first(name)
    (folder / "ImageSets/Main/train.txt").write_text("../../1\n")
    with pytest.raises(DataError, match=r"train.txt names '../../1', which is not in"):
        first("1.jpg")


@pytest.mark.parametrize("size", ["9" * 400, "9" * 5000, "1000001", "0", "-5", "²", "x", "++5"])
def test_sizes_have_limits(tmp_path, capsys, size):
    error = refusal(capsys, "check-data", tmp_path, f"--min-size={size}")
    assert "is not a number of at least 1 and at most 1000000" in error
    assert len(error) < 250


def test_pillow_does_not_talk_beside_results(tmp_path):
    folder = write_yolo(tmp_path / "cells")
    image = Image.new("P", (9500, 9500))
    image.save(folder / "images/train/2.png", transparency=bytes([0] * 200))
    Image.new("P", (13500, 13500)).save(folder / "images/train/4.png")
    command = [sys.executable, "-m", "dsrcnn.cli.main", "check-data", folder]
    text = run_program(*command, status=1)
    assert "Warning" not in text
    assert "exceeds limit" in text


def test_augmented_pictures_need_names_and_numbers(tmp_path):
    cfg = quick_cfg(tmp_path)
    for options in ({"images": 0}, {"images": -1}, {"times": 0}):
        with pytest.raises(ConfigError, match="at least 1"):
            draw_augmented(cfg, tmp_path, **options)
    DatasetCatalog.register("theirs", lambda: [record(1)])
    cfg.defrost()
    cfg.DATASETS.TRAIN = ("theirs",)
    with pytest.raises(DsrcnnError, match="has no class names"):
        draw_augmented(cfg, tmp_path)
