"""Odd YOLO and VOC folders, files that are none, and splits that are absent."""

import json
import os
import re
import shutil
import socket
import time

import pytest
from conftest import quick_cfg, refusal
from data_cases import (
    COUNT,
    boxes_of,
    check,
    coco_content,
    load,
    write_coco,
    write_images,
    write_voc,
    write_yolo,
)
from PIL import Image

from dsrcnn import load_cfg
from dsrcnn.data import build_train_loader
from dsrcnn.data.build import training_records
from dsrcnn.errors import DataError, DsrcnnError

SPLITS = "train: images/train\nval: images/val\n"
BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nd: &d [*c, *c]\nnames: *d\n"

YOLO_FILES = [
    ("data.yaml", f"{SPLITS}names: left\n", r"names is 'left'; list the classes"),
    ("data.yaml", f"{SPLITS}names: 5\n", r"names is 5; list the classes"),
    ("data.yaml", f"{SPLITS}names: true\n", r"names is True; list the classes"),
    ("data.yaml", f"{SPLITS}names:\n", "lacks names"),
    ("data.yaml", f"{SPLITS}names: []\n", "lacks names"),
    ("data.yaml", f"{SPLITS}names: {{}}\n", "lacks names"),
    ("data.yaml", f"{SPLITS}names: {{0: a, x: b}}\n", "without gaps"),
    ("data.yaml", f"{SPLITS}names: {{0: a, '0': b}}\n", "without gaps"),
    ("data.yaml", f"{SPLITS}names: {{1: a, 2: b}}\n", "without gaps"),
    ("data.yaml", f"{SPLITS}names: {{0.0: a, 1: b}}\n", "without gaps"),
    ("data.yaml", f"{SPLITS}names: {{true: a, 0: b}}\n", "without gaps"),
    ("data.yaml", f"{SPLITS}names: [a, a]\n", "has the class name 'a' twice"),
    ("data.yaml", f"{SPLITS}names: [a, 5]\n", r"class name 5 \(number 1\)"),
    ("data.yaml", f"{SPLITS}names: [a, yes]\n", "class name True"),
    ("data.yaml", f"{SPLITS}names: [a, null]\n", "class name None"),
    ("data.yaml", f"{SPLITS}names: [a, [b]]\n", r"class name \['b'\]"),
    ("data.yaml", f"{SPLITS}names: [a, 2020-01-01]\n", "class name datetime"),
    ("data.yaml", f"{SPLITS}names: [a, '']\n", "class name ''"),
    ("data.yaml", f"{SPLITS}names: [a, b]\nnc: 3\n", "nc is 3, but names lists 2 classes"),
    ("data.yaml", f"{SPLITS}names: [a, b]\nnc: '2'\n", "nc is '2', but names lists 2 classes"),
    ("data.yaml", f"{SPLITS}names: [a]\nnc: true\n", "nc is True"),
    ("data.yaml", f"{SPLITS}names: [a]\n", "class 1; data.yaml names classes 0 to 0"),
    ("data.yaml", f"{SPLITS}{BOMB}", "has the class name"),
    ("data.yaml", "", "holds no keys"), ("data.yaml", "5", "holds no keys"),
    ("data.yaml", "- train", "holds no keys"), ("data.yaml", "a: b: c", "is not valid YAML"),
    ("data.yaml", "a: !!int ''", "is not valid YAML"),
    ("data.yaml", "a: 2020-99-99", "is not valid YAML"),
    ("data.yaml", "a: !!python/object/apply:os.system [ls]", "is not valid YAML"),
    ("data.yaml", "? [a]\n: b", "is not valid YAML"), ("data.yaml", "a: \x00", "is not valid YAML"),
    ("data.yaml", "[" * 500, "is not valid YAML"), ("data.yaml", b"\xff\xfe", "no text in UTF-8"),
    ("data.yaml", "names: [a]", "names no train, val or test"),
    ("data.yaml", "train: nowhere\nval: x\nnames: [a]", "names nowhere, which is not at"),
    ("data.yaml", "train: 5\nval: x\nnames: [a]", "train is 5; write a folder of images"),
    ("data.yaml", "train: {a: b}\nval: x\nnames: [a]", "write a folder of images"),
    ("data.yaml", "train: [1]\nval: x\nnames: [a]", "write a folder of images"),
    ("data.yaml", 'train: "a\\0b"\nval: x\nnames: [a]', "null byte"),
    ("data.yaml", f"train: {'x' * 300}\nval: x\nnames: [a]", "too long"),
    ("data.yaml", "train: data.yaml\nval: images/val\nnames: [a]", "is no folder"),
    ("data.yaml", "train: labels/train\nval: images/val\nnames: [a]", "lists no images"),
    ("labels/train/1.txt", "0 0.5 0.5", "1.txt, line 1: .*; write class, center x"),
    ("labels/train/1.txt", "left 0.5 0.5 0.1 0.1", "1.txt, line 1"),
    ("labels/train/1.txt", "0 0,5 0,5 0,1 0,1", "1.txt, line 1"),
    ("labels/train/1.txt", "0.5 0.5 0.5 0.1 0.1", "class 0.5; data.yaml names"),
    ("labels/train/1.txt", "-1 0.5 0.5 0.1 0.1", "class -1; data.yaml names"),
    ("labels/train/1.txt", "2 0.5 0.5 0.1 0.1", "class 2; data.yaml names classes 0 to 1"),
    ("labels/train/1.txt", "nan 0.5 0.5 0.1 0.1", "class nan; data.yaml"),
    ("labels/train/1.txt", "inf 0.5 0.5 0.1 0.1", "class inf; data.yaml"),
    ("labels/train/1.txt", "0 .1 .1 .9 .1 .9 .9 .5", "corners of a polygon"),
    ("labels/train/1.txt", b"0 \xff\xfe", "no text in UTF-8"),
    ("labels/train/1.txt", b"0 .5 .5 .1 .1\x00", "1.txt, line 1"),
    ("labels/train/1.txt", "folder", "Label file .*1.txt is a folder, not a file"),
    ("labels/train/1.txt", "pipe", "Label file .*1.txt is a named pipe, not a file"),
    ("labels/train/1.txt", "socket", "Label file .*1.txt is a socket, not a file"),
    ("labels/train/1.txt", "loop", "Label file .*1.txt cannot be opened"),
    ("labels/train/1.txt", "device", "Label file .*1.txt is a device, not a file"),
    ("labels/train/1.txt", "broken link", "Label file .*1.txt does not exist"),
    ("images/train/1.jpg", "folder", "1.jpg cannot be read .is a folder"),
    ("images/train/1.jpg", "pipe", "1.jpg cannot be read .is a named pipe"),
    ("images/train/1.jpg", "loop", "1.jpg cannot be read .cannot be opened"),
    ("images/train/1.jpg", "device", "1.jpg cannot be read .is a device"),
    ("images/train/1.jpg", b"", "1.jpg cannot be read"),
    ("images/train/1.jpg", b"no image", "1.jpg cannot be read"),
]  # fmt: skip

VOC_FILES = [
    ("Annotations/1.xml", "", "1.xml is not valid XML"),
    ("Annotations/1.xml", "{}", "1.xml is not valid XML"),
    ("Annotations/1.xml", "<annotation>", "1.xml is not valid XML"),
    ("Annotations/1.xml", b"<a>\xff\xfe</a>", "1.xml is not valid XML"),
    ("Annotations/1.xml", '<?xml version="1.0" encoding="odd"?><a/>', "1.xml is not valid XML"),
    ("Annotations/1.xml", "<a>&nothing;</a>", "1.xml is not valid XML"),
    ("Annotations/1.xml", "<annotation/>", "1.xml lacks size/height"),
    ("Annotations/1.xml", ("<height>64", "<height>0"), "size/height '0'; expected pixels"),
    ("Annotations/1.xml", ("<height>64", "<height>-64"), "size/height '-64'; expected pixels"),
    ("Annotations/1.xml", ("<width>96", "<width>wide"), "size/width 'wide'; expected pixels"),
    ("Annotations/1.xml", ("<width>96", "<width>nan"), "size/width 'nan'; expected pixels"),
    ("Annotations/1.xml", ("<width>96", "<width>inf"), "size/width 'inf'; expected pixels"),
    ("Annotations/1.xml", ("<width>96", "<width> "), "lacks size/width"),
    ("Annotations/1.xml", ("<xmin>5<", "<xmin>five<"), "1.xml.*five"),
    ("Annotations/1.xml", ("<xmin>5</xmin>", ""), "lacks bndbox/xmin"),
    ("Annotations/1.xml", ("<name>left", "<name> "), "lacks name"),
    ("Annotations/1.xml", ("<difficult>0", "<difficult>some"), "1.xml.*0 or 1"),
    ("Annotations/1.xml", ("<difficult>0", "<difficult>2"), "1.xml.*0 or 1"),
    ("Annotations/1.xml", "folder", "1.xml is a folder, not a file"),
    ("Annotations/1.xml", "pipe", "1.xml is a named pipe, not a file"),
    ("Annotations/1.xml", "socket", "1.xml is a socket, not a file"),
    ("Annotations/1.xml", "device", "1.xml is a device, not a file"),
    ("Annotations/1.xml", "loop", "1.xml cannot be opened"),
    ("Annotations/1.xml", "broken link", "1.xml does not exist; add it or take 1 off the list"),
    ("ImageSets/Main/train.txt", b"\xff\xfe", "no text in UTF-8"),
    ("ImageSets/Main/train.txt", "", "no object with a name|lists no images"),
    ("ImageSets/Main/train.txt", "9\n", "9.xml does not exist"),
    ("ImageSets/Main/train.txt", "pipe", "has no split 'train'; it has val"),
    ("ImageSets/Main/train.txt", "folder", "has no split 'train'; it has val"),
    ("JPEGImages/1.jpg", "pipe", "images of Split 'train' .* do not exist"),
    ("JPEGImages/1.jpg", "folder", "images of Split 'train' .* do not exist"),
]  # fmt: skip


def damage(path, content):
    """Replace a file by bytes, text, an edit of its text, or something that is no file."""
    if isinstance(content, tuple):
        path.write_text(path.read_text().replace(*content, 1))
        return
    path.unlink()
    specials = {
        "folder": path.mkdir,
        "pipe": lambda: os.mkfifo(path),
        "socket": lambda: _bind(path),
        "device": lambda: path.symlink_to("/dev/zero"),
        "loop": lambda: path.symlink_to(path.name),
        "broken link": lambda: path.symlink_to("absent"),
    }
    if content in specials:
        specials[content]()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def _bind(path):
    before = os.getcwd()
    os.chdir(path.parent)  # names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as file:
            file.bind(path.name)
    finally:
        os.chdir(before)


def trained(folder):
    """The records of a training."""
    return training_records(quick_cfg(folder, "DATASETS.CUSTOM.FOLDER", str(folder)))


@pytest.mark.parametrize(("file", "content", "phrase"), YOLO_FILES)
def test_odd_yolo_file_is_refused_with_its_name(tmp_path, capsys, file, content, phrase):
    folder = write_yolo(tmp_path / "cells")
    damage(folder / file, content)
    with pytest.raises(DataError, match=phrase) as caught:
        trained(folder)
    assert "\n" not in str(caught.value)
    assert check(folder, capsys, "--output", str(tmp_path / "sheet.png"))[0] != 0


@pytest.mark.parametrize(("file", "content", "phrase"), VOC_FILES)
def test_odd_voc_file_is_refused_with_its_name(tmp_path, capsys, file, content, phrase):
    folder = write_voc(tmp_path / "cells")
    damage(folder / file, content)
    with pytest.raises(DataError, match=phrase) as caught:
        trained(folder)
    assert "\n" not in str(caught.value)
    assert check(folder, capsys, "--output", str(tmp_path / "sheet.png"))[0] != 0


@pytest.mark.parametrize("kind", ["folder", "pipe", "socket", "device", "loop", "broken link"])
@pytest.mark.parametrize("file", ["annotations/instances_train.json", "images/train/1.jpg"])
def test_what_is_no_file_is_refused_at_once(tmp_path, capsys, file, kind):
    folder = write_coco(tmp_path / "cells", coco_content())
    damage(folder / file, kind)
    start = time.monotonic()
    with pytest.raises(DataError, match=r"no split 'train'|do not exist"):
        trained(folder)
    assert check(folder, capsys, "--output", str(tmp_path / "sheet.png"))[0] != 0
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("target", [".", "..", "images"])
def test_links_to_folders_above_are_not_followed(tmp_path, capsys, target):
    folder = write_yolo(tmp_path / "cells")
    (folder / "images/train/again").symlink_to(folder / target)
    (folder / "images/train/pipe").mkdir()
    os.mkfifo(folder / "images/train/pipe/notes.txt")
    assert len(trained(folder)) == COUNT
    assert check(folder, capsys)[0] == 0


@pytest.mark.parametrize("kind", ["absent", "file", "pipe", "loop", "empty", "nul"])
def test_what_is_no_data_folder_is_refused(tmp_path, capsys, kind):
    path = tmp_path / "cells"
    if kind == "empty":
        path.mkdir()
    elif kind != "absent" and kind != "nul":
        path.write_text("")
        damage(path, "" if kind == "file" else kind)
    word = "a\0b" if kind == "nul" else str(path)
    assert "Folder" in refusal(capsys, "check-data", word) or kind == "empty"
    with pytest.raises(DsrcnnError):
        quick_cfg(tmp_path, "DATASETS.CUSTOM.FOLDER", word)


YOLO_ACCEPTED = {
    "numbers as text": f"{SPLITS}names: {{'0': left, '1': right}}",
    "numbers": f"{SPLITS}names: {{1: right, 0: left}}\nnc: 2",
    "floating nc": f"{SPLITS}names: [left, right]\nnc: 2.0",
    "valid for val": "train: images/train\nvalid: images/val\nnames: [left, right]",
    "folder of Roboflow": "train: ../images/train\nval: ../images/val\nnames: [left, right]",
    "backslashes": "train: images\\train\nval: images\\val\nnames: [left, right]",
    "several folders": "train: [images/train]\nval: images/val\nnames: [left, right]",
    "absent test": f"{SPLITS}test: ../test/images\nnames: [left, right]",
    "byte order mark": f"\ufeff{SPLITS}names: [left, right]",
}


@pytest.mark.parametrize("case", YOLO_ACCEPTED)
def test_odd_yolo_files_that_are_clear_are_read(tmp_path, capsys, case):
    folder = write_yolo(tmp_path / "cells")
    (folder / "data.yaml").write_text(YOLO_ACCEPTED[case])
    assert boxes_of(trained(folder)) == 2 * COUNT
    status, text = check(folder, capsys)
    assert status == 0
    assert ("warning: " in text and "test/images" in text) == (case == "absent test")


def test_boxes_of_poses_are_read_without_their_keypoints(tmp_path):
    folder = write_yolo(tmp_path / "cells")
    path = folder / "labels/train/1.txt"
    rows = path.read_text().splitlines()
    path.write_text("\n".join(f"{row} 0.9 0.9 2 0.1 0.1 2" for row in rows))
    text = "names: [left, right]\nkpt_shape: [2, 3]\n"
    (folder / "data.yaml").write_text(SPLITS + text)
    first, second, _ = (r["annotations"][0]["bbox"] for r in trained(folder))
    assert first == second


def test_voc_images_of_another_format_are_found(tmp_path, capsys):
    folder = write_voc(tmp_path / "cells")
    path = folder / "JPEGImages/1.jpg"
    Image.open(path).save(path.with_suffix(".png"))
    path.unlink()
    assert trained(folder)[0]["file_name"].endswith("1.png")
    assert check(folder, capsys)[0] == 0


def test_absent_split_is_refused_where_it_is_used(tmp_path, capsys):
    folder = write_yolo(tmp_path / "cells")
    (folder / "data.yaml").write_text(YOLO_ACCEPTED["absent test"])
    error = refusal(capsys, "check-data", folder, "--splits", "test")
    assert "names ../test/images, which is not at" in error
    words = ["--config-file", "quick/sparse_rcnn_shapes", "DATASETS.CUSTOM.TEST_SPLIT", "test"]
    assert "test/images" in refusal(capsys, "check-data", folder, *words)
    shutil.rmtree(folder / "images/val")
    assert "names images/val" in refusal(capsys, "check-data", folder)


def test_data_without_a_test_split_say_how_to_train(tmp_path, capsys):
    folder = write_yolo(tmp_path / "cells")
    (folder / "data.yaml").write_text("train: images/train\nnames: [left, right]")
    status, text = check(folder, capsys)
    assert status == 0
    assert "Ready to train with DATASETS.CUSTOM.TEST_SPLIT ''" in text
    (folder / "data.yaml").write_text("val: images/val\nnames: [left, right]")
    assert "has no split 'train'; it has val" in refusal(capsys, "check-data", folder)
    assert check_only(folder, capsys, "val") == "No faults. The split to train on was not checked."


def check_only(folder, capsys, split):
    from dsrcnn.cli.main import main

    assert main(["check-data", str(folder), "--splits", split]) == 0
    return capsys.readouterr().out.splitlines()[-1]


def test_export_of_roboflow_is_read(tmp_path, capsys):
    content = coco_content()
    for category in content["categories"]:
        category["supercategory"] = "cells"
    content["categories"].insert(0, {"id": 0, "name": "cells", "supercategory": "none"})
    for seed, split in enumerate(("train", "valid", "test")):
        write_images(tmp_path / "cells" / split, seed)
        path = tmp_path / "cells" / split / "_annotations.coco.json"
        path.write_text(json.dumps(content))
    folder = tmp_path / "cells"
    cfg = quick_cfg(tmp_path, "DATASETS.CUSTOM.FOLDER", str(folder))
    assert cfg.DATASETS.CUSTOM.CLASSES == ("left", "right")
    assert len(next(iter(build_train_loader(cfg)))) == 2
    status, text = check(folder, capsys)
    assert status == 0
    assert "valid" in text


def test_parent_category_that_has_objects_is_a_class(tmp_path):
    content = coco_content()
    content["categories"].insert(0, {"id": 0, "name": "cells", "supercategory": "none"})
    content["annotations"][0]["category_id"] = 0
    records = load(write_coco(tmp_path / "cells", content))
    assert records[0]["annotations"][0]["category_id"] == 0
    assert records[0]["annotations"][1]["category_id"] == 2


def test_check_judges_sizes_and_classes_by_the_config(tmp_path, capsys):
    folder = write_coco(tmp_path / "cells", coco_content())
    config = ["--config-file", "coco/sparse_rcnn_R50_100pro_3x"]
    assert "NUM_CLASSES is 80" in refusal(capsys, "check-data", folder, *config)
    words = ["MODEL.SparseRCNN.NUM_CLASSES", "2", "INPUT.MIN_SIZE_TRAIN", "(16,)"]
    status, text = check(folder, capsys, *config, *words)
    assert status == 0
    assert re.search(r"^0 to 16 +6 +6$", text, re.MULTILINE)
    words = [*config, *words[:2], "DATASETS.CUSTOM.FOLDER", str(folder)]
    from dsrcnn.cli.main import main

    assert main(["check-data", *words]) == 0
    assert re.search(r"^128 to 256 +6 +6$", capsys.readouterr().out, re.MULTILINE)
    assert "write the folder" in refusal(capsys, "check-data")
    assert "write --config-file" in refusal(capsys, "check-data", folder, *words[2:4])


def test_check_reads_the_json_files_of_a_config(tmp_path, capsys, write):
    folder = write_coco(tmp_path / "cells", coco_content())
    lines = [
        f"    {key}_JSON: {folder}/annotations/instances_{split}.json\n    {key}_IMAGES: "
        f"{folder}/images/{split}\n"
        for key, split in (("TRAIN", "train"), ("TEST", "val"))
    ]
    model = "MODEL: {META_ARCHITECTURE: SparseRCNN, SparseRCNN: {NUM_CLASSES: 0}}\n"
    config = write(f"{model}DATASETS:\n  CUSTOM:\n    NAME: cells\n" + "".join(lines))
    from dsrcnn.cli.main import main

    assert main(["check-data", "--config-file", str(config)]) == 0
    assert "Ready to train." in capsys.readouterr().out
    content = coco_content()
    content["images"][0]["width"] = 0
    (folder / "annotations/instances_train.json").write_text(json.dumps(content))
    assert main(["check-data", "--config-file", str(config)]) == 1
    assert load_cfg(config).DATASETS.TRAIN == ("cells_train",)
