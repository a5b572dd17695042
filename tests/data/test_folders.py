"""Folders in the layouts of COCO, Pascal VOC and YOLO."""

import shutil
from pathlib import Path

import pytest
from conftest import write_coco as write_coco_json
from conftest import write_voc
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from dsrcnn import load_cfg
from dsrcnn.data import DetectionMapper
from dsrcnn.errors import ConfigError, DataError

QUICK = "quick/sparse_rcnn_shapes"
FOLDER, TEST_SPLIT = "DATASETS.CUSTOM.FOLDER", "DATASETS.CUSTOM.TEST_SPLIT"
COUNTS = {"train": 4, "val": 2}
# As `write_coco` of conftest writes them: class names in alphabetical order, 96 x 64 pixels.
OBJECTS = {"left": (5, 5, 30, 30), "right": (50, 20, 40, 30)}
NAMES = list(OBJECTS)


def write_coco(folder):
    for split, count in COUNTS.items():
        json_file = folder / f"annotations/instances_{split}.json"
        write_coco_json(json_file, folder / "images" / split, count)


def write_voc_layout(folder):
    objects = [(name, x + 1, y + 1, x + w, y + h) for name, (x, y, w, h) in OBJECTS.items()]
    splits = {k: [str(i + 1) for i in range(count)] for k, count in COUNTS.items()}
    write_voc(folder, dict.fromkeys(splits["train"], objects), splits)


def write_yolo(folder):
    rows = [
        f"{label} {(x + w / 2) / 96!r} {(y + h / 2) / 64!r} {w / 96!r} {h / 64!r}"
        for label, (x, y, w, h) in enumerate(OBJECTS.values())
    ]
    for split, count in COUNTS.items():
        write_coco_json(folder / "coco.json", folder / "images" / split, count)
        (folder / "labels" / split).mkdir(parents=True)
        for number in range(1, count + 1):
            (folder / "labels" / split / f"{number}.txt").write_text("\n".join(rows))
    splits = "".join(f"{split}: images/{split}\n" for split in COUNTS)
    names = "".join(f"  {label}: {name}\n" for label, name in enumerate(NAMES))
    (folder / "data.yaml").write_text(f"path: /elsewhere\n{splits}names:\n{names}")


WRITERS = {"coco": write_coco, "voc": write_voc_layout, "yolo": write_yolo}


@pytest.fixture
def folder_of(tmp_path):
    """Writes a folder of a layout; returns its path."""

    def write(layout):
        WRITERS[layout](tmp_path / layout)
        return tmp_path / layout

    return write


def custom(folder, *opts):
    return load_cfg(QUICK, [FOLDER, str(folder), *opts])


def records_of(folder, split="train"):
    cfg = custom(folder)
    (name,) = cfg.DATASETS.TRAIN if split == "train" else cfg.DATASETS.TEST
    assert MetadataCatalog.get(name).thing_classes == NAMES
    assert cfg.MODEL.SparseRCNN.NUM_CLASSES == 2
    return DatasetCatalog.get(name)


@pytest.mark.parametrize("split", COUNTS)
@pytest.mark.parametrize("layout", ["voc", "yolo"])
def test_all_layouts_give_the_same_records(folder_of, layout, split):
    expected, records = (records_of(folder_of(name), split) for name in ("coco", layout))
    assert len(expected) == len(records) == COUNTS[split]
    for a, b in zip(expected, records, strict=True):
        assert a["file_name"].rsplit("/", 1)[-1] == b["file_name"].rsplit("/", 1)[-1]
        for key in ("height", "width", "image_id"):
            assert a[key] == b[key]
        for x, y in zip(a["annotations"], b["annotations"], strict=True):
            assert y["bbox"] == pytest.approx(x["bbox"], abs=1e-9)
            for key in ("category_id", "bbox_mode", "iscrowd"):
                assert x[key] == y[key]


@pytest.mark.parametrize("layout", WRITERS)
def test_the_saved_config_of_a_folder_works_elsewhere(folder_of, tmp_path, layout):
    folder, saved = folder_of(layout), tmp_path / "config.yaml"
    saved.write_text(custom(folder).dump())
    cfg = load_cfg(saved, [TEST_SPLIT, "train"])
    assert len(DatasetCatalog.get(cfg.DATASETS.TEST[0])) == COUNTS["train"]
    moved = tmp_path / "moved"
    shutil.move(folder, moved)
    cfg = load_cfg(saved, [FOLDER, str(moved)])
    records = DatasetCatalog.get(cfg.DATASETS.TEST[0])
    assert all(r["file_name"].startswith(str(moved)) for r in records)
    cfg = load_cfg(saved)  # without the folder
    assert cfg.MODEL.SparseRCNN.NUM_CLASSES == 2
    assert list(cfg.DATASETS.CUSTOM.CLASSES) == NAMES
    assert MetadataCatalog.get(cfg.DATASETS.TEST[0]).thing_classes == NAMES
    with pytest.raises(DataError, match="does not exist"):
        DatasetCatalog.get(cfg.DATASETS.TEST[0])


def test_empty_test_split_leaves_nothing_to_evaluate(folder_of):
    cfg = custom(folder_of("yolo"), TEST_SPLIT, "")
    assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == (("yolo_train",), ())


def test_difficult_objects_of_voc_become_crowds(folder_of):
    folder = folder_of("voc")
    path = folder / "Annotations/1.xml"
    path.write_text(path.read_text().replace("<difficult>0", "<difficult>1", 1))
    crowds = [a["iscrowd"] for a in records_of(folder)[0]["annotations"]]
    assert crowds == [1, 0]


def test_voc_lists_of_single_classes_are_no_splits(folder_of):
    folder = folder_of("voc")
    (folder / "ImageSets/Main/left_train.txt").write_text("1 1\n")
    with pytest.raises(DataError, match=r"no split 'test'; it has train, val"):
        custom(folder, TEST_SPLIT, "test")


def test_names_in_voc_lists_may_have_spaces_and_a_number_behind_them(folder_of):
    folder = folder_of("voc")
    for kind, ending in (("Annotations", "xml"), ("JPEGImages", "jpg")):
        (folder / f"{kind}/1.{ending}").rename(folder / f"{kind}/my image.{ending}")
    (folder / "ImageSets/Main/val.txt").write_text("2\n")
    listed = folder / "ImageSets/Main/train.txt"
    listed.write_text("my image\n2\n")
    names = [Path(record["file_name"]).stem for record in records_of(folder)]
    assert names == ["my image", "2"]
    listed.write_text("my image  1\n2 -1\n")
    assert [Path(record["file_name"]).stem for record in records_of(folder)] == names


def test_names_in_voc_lists_may_end_in_a_number(folder_of):
    folder = folder_of("voc")
    for number in ("1", "2"):
        (folder / f"Annotations/{number}.xml").rename(folder / f"Annotations/scan {number}.xml")
        (folder / f"JPEGImages/{number}.jpg").rename(folder / f"JPEGImages/scan {number}.jpg")
    shutil.copy(folder / "Annotations/scan 2.xml", folder / "Annotations/scan.xml")
    (folder / "ImageSets/Main/val.txt").write_text("3\n")
    listed = folder / "ImageSets/Main/train.txt"
    for lines, expected in (
        (["scan 1", "scan 2"], ["scan 1", "scan 2"]),
        (["scan 1", "3"], ["scan 1", "3"]),
        (["scan 1"], ["scan 1"]),
        (["scan 1 1", "3 -1"], ["scan 1", "3"]),
    ):
        listed.write_text("\n".join(lines))
        assert [Path(record["file_name"]).stem for record in records_of(folder)] == expected


def test_a_split_that_is_absent_says_how_to_name_another(folder_of):
    with pytest.raises(DataError, match=r"it has train, val\. Name one of these, .*TEST_SPLIT"):
        custom(folder_of("voc"), TEST_SPLIT, "test")


def test_voc_keeps_the_classes_of_the_model(folder_of):
    folder = folder_of("voc")
    expected = [a["category_id"] + 1 for r in records_of(folder) for a in r["annotations"]]
    cfg = custom(folder, "DATASETS.CUSTOM.CLASSES", ("above", *NAMES))
    assert list(cfg.DATASETS.CUSTOM.CLASSES) == ["above", *NAMES]
    records = DatasetCatalog.get(cfg.DATASETS.TRAIN[0])
    assert [a["category_id"] for r in records for a in r["annotations"]] == expected
    fewer = custom(folder, "DATASETS.CUSTOM.CLASSES", ("left",))
    with pytest.raises(DataError, match="known are left"):
        DatasetCatalog.get(fewer.DATASETS.TRAIN[0])


def test_yolo_reads_lists_of_images_polygons_and_missing_labels(folder_of):
    folder = folder_of("yolo")
    (folder / "labels/train/1.txt").unlink()
    polygon, prediction = "1 0.1 0.3 0.9 0.2 0.5 0.8", "0 0.5 0.5 0.2 0.2 0.93"
    (folder / "labels/train/2.txt").write_text(f"{polygon}\n{prediction}\n")
    (folder / "train.txt").write_text("images/train/1.jpg\nimages/train/2.jpg\n")
    text = (folder / "data.yaml").read_text().replace("train: images/train", "train: train.txt")
    (folder / "data.yaml").write_text(text)
    empty, record = records_of(folder)
    assert empty["annotations"] == []
    width, height = record["width"], record["height"]
    boxes = [a["bbox"] for a in record["annotations"]]
    assert boxes[0] == pytest.approx([0.1 * width, 0.2 * height, 0.8 * width, 0.6 * height])
    assert boxes[1] == pytest.approx([0.4 * width, 0.4 * height, 0.2 * width, 0.2 * height])


def test_yolo_reads_every_kind_of_image_and_linked_folders_once(folder_of, tmp_path, messages):
    folder = folder_of("yolo")
    images = folder / "images/train"
    (images / "2.jpg").rename(images / "2.JFIF")
    Image.open(images / "3.jpg").save(images / "3.gif")
    (images / "3.jpg").unlink()
    for kind in ("images", "labels"):
        shutil.move(folder / kind / "train", tmp_path / f"more/{kind}/new")
        (folder / kind / "train").mkdir()
        (folder / kind / "train/new").symlink_to(tmp_path / f"more/{kind}/new")
    (tmp_path / "more/images/new/circle").symlink_to(tmp_path / "more")
    (tmp_path / "more/images/new/.1.jpg").write_bytes(b"hidden")
    records = records_of(folder)
    assert [Path(r["file_name"]).name for r in records] == ["1.jpg", "2.JFIF", "3.gif", "4.jpg"]
    assert all(len(record["annotations"]) == 2 for record in records)
    assert not any("label" in message for message in messages())


def test_yolo_labels_without_an_image_are_reported(folder_of, messages):
    folder = folder_of("yolo")
    (folder / "images/train/2.jpg").rename(folder / "images/train/2.raw")
    (folder / "labels/train/classes.txt").write_text("left\nright\n")
    assert len(records_of(folder)) == 3
    (message,) = (text for text in messages() if "label" in text)
    assert "1 label files have no image (label without image)" in message
    assert f"{folder / 'labels/train/2.txt'}." in message


def test_rotated_photos_have_their_displayed_size(folder_of):
    folder = folder_of("yolo")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (96, 64)).save(folder / "images/train/1.jpg", exif=exif)
    cfg = custom(folder)
    record = DatasetCatalog.get(cfg.DATASETS.TRAIN[0])[0]
    assert (record["width"], record["height"]) == (64, 96)
    height, width = DetectionMapper(cfg, is_train=True)(record)["image"].shape[1:]
    assert height > width


@pytest.mark.parametrize(("layout", "file", "content", "expected"), [
    ("voc", "Annotations/2.xml", None, ["2.xml does not exist", "take 2 off the list"]),
    ("voc", "Annotations/2.xml", b"<annotation>", ["2.xml is not valid XML"]),
    ("voc", "Annotations/2.xml", b"<annotation/>", ["2.xml lacks size/height"]),
    ("voc", "ImageSets/Main/train.txt", b"\xff\xfe", ["train.txt is no text in UTF-8"]),
    ("yolo", "labels/train/2.txt", b"0 0.5 0.5\n", ["2.txt, line 1", "center x"]),
    ("yolo", "labels/train/2.txt", b"9 0.5 0.5 0.1 0.1\n", ["class 9", "classes 0 to 1"]),
    ("yolo", "labels/train/2.txt", b"0 .1 .1 .9 .1 .9 .9 .5\n", ["corners of a polygon"]),
    ("yolo", "labels/train/2.txt", b"0 \xff\xfe", ["2.txt is no text in UTF-8"]),
    ("yolo", "images/train/2.jpg", b"broken", ["2.jpg cannot be read"]),
    ("yolo", "data.yaml", b"train: images/train\nval: images/val\n", ["lacks names"]),
    ("yolo", "data.yaml", b"train: nowhere\nval: images/val\nnames: [a]\n", ["names nowhere"]),
    ("yolo", "data.yaml", b"names: {0: a, 2: b}\ntrain: x\nval: y\n", ["without gaps"]),
    ("yolo", "data.yaml", b"names: [", ["not valid YAML"]),
    ("yolo", "data.yaml", b"names: [a]\n", ["names no train, val or test"]),
])  # fmt: skip
def test_message_names_the_broken_file(folder_of, layout, file, content, expected):
    folder = folder_of(layout)
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_bytes(content)
    with pytest.raises(DataError) as caught:
        DatasetCatalog.get(custom(folder).DATASETS.TRAIN[0])
    assert all(part in str(caught.value) for part in expected), str(caught.value)


@pytest.mark.parametrize(("key", "value", "expected"), [
    (TEST_SPLIT, "test", r"no split 'test'; it has train, val"),
    (FOLDER, "/nothing", "'/nothing' does not exist"),
    (FOLDER, ".", "none of the known layouts.*data.yaml"),
])  # fmt: skip
def test_message_says_what_a_folder_lacks(folder_of, key, value, expected):
    with pytest.raises(DataError, match=expected):
        custom(folder_of("coco"), key, value)


def test_folder_and_files_exclude_each_other(folder_of):
    with pytest.raises(ConfigError, match="one or the other"):
        custom(folder_of("coco"), "DATASETS.CUSTOM.TRAIN_JSON", "train.json")
