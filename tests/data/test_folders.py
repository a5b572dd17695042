"""Folders in the layouts of COCO, Pascal VOC and YOLO."""

import json
import shutil

import cv2
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from dsrcnn import load_cfg
from dsrcnn.data import DetectionMapper
from dsrcnn.data.datasets.shapes import CLASSES, draw_scene, shapes_records
from dsrcnn.engine.main import run
from dsrcnn.errors import ConfigError, DataError

pytestmark = pytest.mark.usefixtures("clean_catalogs")

QUICK = "quick/sparse_rcnn_shapes"
SPLITS = {"train": range(6), "val": range(6, 9)}
# Alphabetical, as VOC lists no classes.
NAMES = sorted(CLASSES)


def scenes(split):
    """File name, size and (class name, xywh box) of every object of the images of a split."""
    records = shapes_records("val")
    for index in SPLITS[split]:
        record = records[index]
        objects = [
            (CLASSES[a["category_id"]], (x1, y1, x2 - x1, y2 - y1))
            for a in record["annotations"]
            for x1, y1, x2, y2 in [map(float, a["bbox"])]
        ]
        yield f"{index:02d}.png", record["height"], record["width"], objects


def write_image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), draw_scene("val", int(path.stem)))


def write_coco(folder):
    (folder / "annotations").mkdir(parents=True)
    for split in SPLITS:
        images, annotations = [], []
        for number, (name, height, width, objects) in enumerate(scenes(split), start=1):
            write_image(folder / "images" / split / name)
            size = {"height": height, "width": width}
            images.append({"id": number, "file_name": name, **size})
            for label, box in objects:
                entry = {"id": len(annotations) + 1, "image_id": number, "bbox": box}
                area = {"area": box[2] * box[3], "iscrowd": 0}
                annotations.append({**entry, **area, "category_id": NAMES.index(label) + 1})
        categories = [{"id": i + 1, "name": name} for i, name in enumerate(NAMES)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / f"annotations/instances_{split}.json").write_text(json.dumps(content))


def write_voc(folder):
    for name in ("Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    for split in SPLITS:
        names = []
        for name, height, width, objects in scenes(split):
            write_image(folder / "JPEGImages" / name)
            parts = [f"<filename>{name}</filename>"]
            parts += [f"<size><width>{width}</width><height>{height}</height></size>"]
            for label, (x, y, w, h) in objects:
                edges = {"xmin": x + 1, "ymin": y + 1, "xmax": x + w, "ymax": y + h}
                box = "".join(f"<{k}>{v:g}</{k}>" for k, v in edges.items())
                parts.append(f"<object><name>{label}</name><bndbox>{box}</bndbox></object>")
            text = f"<annotation>{''.join(parts)}</annotation>"
            stem = name.split(".")[0]
            (folder / "Annotations" / f"{stem}.xml").write_text(text)
            names.append(stem)
        (folder / f"ImageSets/Main/{split}.txt").write_text("\n".join(names))


def write_yolo(folder):
    for split in SPLITS:
        for name, height, width, objects in scenes(split):
            write_image(folder / "images" / split / name)
            rows = [
                (NAMES.index(n), (x + w / 2) / width, (y + h / 2) / height, w / width, h / height)
                for n, (x, y, w, h) in objects
            ]
            labels = folder / "labels" / split / name.replace(".png", ".txt")
            labels.parent.mkdir(parents=True, exist_ok=True)
            labels.write_text("\n".join(" ".join(map(repr, row)) for row in rows))
    names = "\n".join(f"  {i}: {name}" for i, name in enumerate(NAMES))
    splits = "".join(f"{split}: images/{split}\n" for split in SPLITS)
    (folder / "data.yaml").write_text(f"path: /elsewhere\n{splits}names:\n{names}\n")


WRITERS = {"coco": write_coco, "voc": write_voc, "yolo": write_yolo}


@pytest.fixture
def folder_of(tmp_path):
    def write(kind):
        WRITERS[kind](tmp_path / kind)
        return tmp_path / kind

    return write


def custom(folder, *opts):
    return load_cfg(QUICK, ["DATASETS.CUSTOM.FOLDER", str(folder), *opts])


def records_of(folder, split):
    cfg = custom(folder)
    (name,) = cfg.DATASETS.TRAIN if split == "train" else cfg.DATASETS.TEST
    assert MetadataCatalog.get(name).thing_classes == NAMES
    assert cfg.MODEL.SparseRCNN.NUM_CLASSES == 5
    return DatasetCatalog.get(name)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", ["voc", "yolo"])
def test_all_layouts_give_the_same_records(folder_of, kind, split):
    expected, found = records_of(folder_of("coco"), split), records_of(folder_of(kind), split)
    assert len(expected) == len(found) == len(SPLITS[split])
    for a, b in zip(expected, found, strict=True):
        assert a["file_name"].rsplit("/", 1)[-1] == b["file_name"].rsplit("/", 1)[-1]
        assert [a[k] for k in ("height", "width", "image_id")] == [
            b[k] for k in ("height", "width", "image_id")
        ]
        assert [x["category_id"] for x in a["annotations"]] == [
            x["category_id"] for x in b["annotations"]
        ]
        for x, y in zip(a["annotations"], b["annotations"], strict=True):
            assert y["bbox"] == pytest.approx(x["bbox"], abs=1e-9)
            assert (x["bbox_mode"], x["iscrowd"]) == (y["bbox_mode"], y["iscrowd"])


@pytest.mark.parametrize("kind", WRITERS)
def test_a_folder_trains_and_evaluates_and_its_config_works_without_it(folder_of, tmp_path, kind):
    from conftest import SMALL

    folder, output = folder_of(kind), tmp_path / "out"
    options = [*SMALL, "DATASETS.CUSTOM.FOLDER", str(folder), "OUTPUT_DIR", str(output)]
    assert run(["--config-file", QUICK, *options, "SOLVER.MAX_ITER", "1", "LOG.IMAGES", "0"]) == 0
    assert (output / "inference/coco_instances_results.json").is_file()
    again = load_cfg(output / "config.yaml")
    assert list(again.DATASETS.CUSTOM.CLASSES) == NAMES
    shutil.rmtree(folder)
    elsewhere = load_cfg(output / "config.yaml")
    assert elsewhere.MODEL.SparseRCNN.NUM_CLASSES == 5
    assert list(elsewhere.DATASETS.CUSTOM.CLASSES) == NAMES


def test_difficult_objects_of_voc_are_not_learned(folder_of):
    folder = folder_of("voc")
    path = folder / "Annotations/00.xml"
    path.write_text(path.read_text().replace("<object>", "<object><difficult>1</difficult>", 1))
    crowds = [a["iscrowd"] for a in records_of(folder, "train")[0]["annotations"]]
    assert crowds == [1] + [0] * (len(crowds) - 1)


def test_lists_of_single_classes_are_no_splits_of_voc(folder_of):
    folder = folder_of("voc")
    (folder / "ImageSets/Main/circle_train.txt").write_text("00 1\n")
    with pytest.raises(DataError, match=r"no split 'test'; it has train, val"):
        custom(folder, "DATASETS.CUSTOM.TEST_SPLIT", "test")


def test_yolo_takes_lists_of_images_and_images_without_labels(folder_of):
    folder = folder_of("yolo")
    (folder / "labels/train/01.txt").unlink()
    (folder / "train.txt").write_text("images/train/00.png\nimages/train/01.png\n")
    text = (folder / "data.yaml").read_text().replace("train: images/train", "train: train.txt")
    (folder / "data.yaml").write_text(text)
    records = records_of(folder, "train")
    assert [bool(r["annotations"]) for r in records] == [True, False]


@pytest.mark.parametrize(
    ("kind", "file", "content", "words"),
    [
        ("voc", "Annotations/01.xml", None, ["01.xml does not exist", "take 01 off the list"]),
        ("voc", "Annotations/01.xml", "<annotation>", ["01.xml is not valid XML"]),
        (
            "voc",
            "Annotations/01.xml",
            "<annotation><filename>01.png</filename></annotation>",
            ["01.xml lacks size/height"],
        ),
        ("yolo", "labels/train/01.txt", "0 0.5 0.5\n", ["01.txt, line 1", "centre x"]),
        ("yolo", "labels/train/01.txt", "9 0.5 0.5 0.1 0.1\n", ["class 9", "classes 0 to 4"]),
        ("yolo", "data.yaml", "train: images/train\nval: images/val\n", ["lacks names"]),
        ("yolo", "data.yaml", "train: nowhere\nval: images/val\nnames: [a]\n", ["names nowhere"]),
        ("yolo", "data.yaml", "names: {0: a, 2: b}\ntrain: x\nval: y\n", ["without gaps"]),
        ("yolo", "data.yaml", "names: [", ["not valid YAML"]),
        ("yolo", "images/train/01.png", "broken", ["01.png cannot be read"]),
        ("yolo", "labels/train/01.txt", "0 .1 .1 .9 .1 .9 .9 .5\n", ["corners of a polygon"]),
        ("yolo", "labels/train/01.txt", b"0 \xff\xfe", ["01.txt is no text in UTF-8"]),
        ("voc", "ImageSets/Main/train.txt", b"\xff\xfe", ["train.txt is no text in UTF-8"]),
        ("yolo", "data.yaml", "names: [a]\n", ["names no train, val or test"]),
    ],
)
def test_broken_folders_are_one_message(folder_of, kind, file, content, words):
    folder = folder_of(kind)
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as caught:
        DatasetCatalog.get(custom(folder).DATASETS.TRAIN[0])
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("opts", "error", "words"),
    [
        (["DATASETS.CUSTOM.TEST_SPLIT", "test"], DataError, ["the splits of", "train, val"]),
        (["DATASETS.CUSTOM.FOLDER", "/nothing"], DataError, ["'/nothing' does not exist"]),
        (["DATASETS.CUSTOM.FOLDER", "."], DataError, ["none of the known layouts", "data.yaml"]),
    ],
)
def test_a_folder_that_is_not_there_is_one_message(folder_of, opts, error, words):
    with pytest.raises(error) as caught:
        custom(folder_of("coco"), *opts)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_folder_and_files_are_too_much(folder_of, kind):
    folder = folder_of(kind)
    with pytest.raises(ConfigError, match="one or the other"):
        custom(folder, "DATASETS.CUSTOM.TRAIN_JSON", "train.json")


@pytest.mark.parametrize("kind", WRITERS)
def test_a_saved_config_takes_another_split_or_folder(folder_of, tmp_path, kind):
    folder = folder_of(kind)
    saved = tmp_path / "config.yaml"
    saved.write_text(custom(folder).dump())
    for opts, source in (
        (["DATASETS.CUSTOM.TEST_SPLIT", "train"], folder),
        (["DATASETS.CUSTOM.FOLDER", str(tmp_path / "moved")], tmp_path / "moved"),
    ):
        if source != folder:
            shutil.copytree(folder, source)
        cfg = load_cfg(saved, opts)
        records = DatasetCatalog.get(cfg.DATASETS.TEST[0])
        assert all(r["file_name"].startswith(str(source)) for r in records)
        assert len(records) == len(SPLITS["train" if source == folder else "val"])


@pytest.mark.parametrize("kind", WRITERS)
def test_a_model_knows_its_classes_where_the_folder_is_gone(folder_of, tmp_path, kind):
    folder = folder_of(kind)
    saved = tmp_path / "config.yaml"
    saved.write_text(custom(folder).dump())
    shutil.rmtree(folder)
    cfg = load_cfg(saved)
    (name,) = cfg.DATASETS.TEST
    assert MetadataCatalog.get(name).thing_classes == NAMES
    with pytest.raises(DataError, match="does not exist"):
        DatasetCatalog.get(name)


def test_classes_of_voc_stay_those_of_the_model(folder_of):
    folder = folder_of("voc")
    seen = ["aardvark", *NAMES]
    cfg = custom(folder, "DATASETS.CUSTOM.CLASSES", tuple(seen))
    assert list(cfg.DATASETS.CUSTOM.CLASSES) == seen
    expected = {a["category_id"] + 1 for r in records_of(folder, "train") for a in r["annotations"]}
    cfg = custom(folder, "DATASETS.CUSTOM.CLASSES", tuple(seen))
    found = DatasetCatalog.get(cfg.DATASETS.TRAIN[0])
    assert {a["category_id"] for r in found for a in r["annotations"]} == expected
    fewer = custom(folder, "DATASETS.CUSTOM.CLASSES", tuple(NAMES[:1]))
    with pytest.raises(DataError, match=f"known are {NAMES[0]}"):
        DatasetCatalog.get(fewer.DATASETS.TRAIN[0])


def test_polygons_of_yolo_become_the_boxes_around_them(folder_of):
    folder = folder_of("yolo")
    label = folder / "labels/train/01.txt"
    label.write_text("1 0.1 0.3 0.9 0.2 0.5 0.8\n0 0.5 0.5 0.2 0.2 0.93\n")
    record = next(r for r in records_of(folder, "train") if "01.png" in r["file_name"])
    width, height = record["width"], record["height"]
    boxes = [a["bbox"] for a in record["annotations"]]
    assert boxes[0] == pytest.approx([0.1 * width, 0.2 * height, 0.8 * width, 0.6 * height])
    assert boxes[1] == pytest.approx([0.4 * width, 0.4 * height, 0.2 * width, 0.2 * height])


def test_turned_photos_have_the_size_they_are_shown_in(folder_of):
    folder = folder_of("yolo")
    exif = Image.Exif()
    exif[0x0112] = 6
    (folder / "images/train/01.png").unlink()
    Image.new("RGB", (96, 64)).save(folder / "images/train/01.jpg", exif=exif)
    cfg = custom(folder)
    records = DatasetCatalog.get(cfg.DATASETS.TRAIN[0])
    record = next(r for r in records if "01.jpg" in r["file_name"])
    assert (record["width"], record["height"]) == (64, 96)
    assert DetectionMapper(cfg, is_train=True)(record)["image"].shape[1:] != (64, 96)


def test_without_a_test_split_nothing_is_evaluated(folder_of):
    cfg = custom(folder_of("yolo"), "DATASETS.CUSTOM.TEST_SPLIT", "")
    assert cfg.DATASETS.TRAIN == ("yolo_train",)
    assert cfg.DATASETS.TEST == ()
