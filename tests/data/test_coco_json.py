"""COCO files: labels, one clear message for each fault, and the two real datasets."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image

from dsrcnn.data import register_coco_json
from dsrcnn.data.datasets.coco import load_checked_coco_json, read_categories
from dsrcnn.errors import DataError

NAME = "json_under_test"
DATA = REPOSITORY.parent / "shared/data"


def content_of(boxes=((10, 10, 20, 20), (5, 5, 10, 10)), **replaced):
    """Two images of 100 x 50 with all boxes (xywh) on the first; None leaves a key out."""
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "height": 50, "width": 100} for i in (1, 2)],
        "annotations": [
            {"id": i, "image_id": 1, "category_id": 1 + i % 2, "bbox": list(box), "iscrowd": 0}
            for i, box in enumerate(boxes)
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }
    return {k: v for k, v in {**content, **replaced}.items() if v is not None}


def edited(part, **changes):
    """The same with all entries of a list changed."""
    return content_of(**{part: [{**entry, **changes} for entry in content_of()[part]]})


def without(part, key):
    entries = content_of()[part]
    return content_of(**{part: [{k: v for k, v in e.items() if k != key} for e in entries]})


@pytest.fixture
def write(tmp_path):
    """Writes a COCO file and its images; returns the paths of both."""

    def write(content, images=("1.png", "2.png")):
        for name in images:
            Image.fromarray(np.zeros((50, 100, 3), np.uint8)).save(tmp_path / name)
        path = tmp_path / "boxes.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path), str(tmp_path)

    return write


def load(paths):
    return load_checked_coco_json(*paths, NAME)


def test_records_are_in_the_format_of_detectron2(write, messages):
    content = content_of([(10, 10, 20, 20), (-10, 5, 40, 60)])
    content["annotations"][1]["iscrowd"] = 1
    first, second = load(write(content))
    assert Path(first["file_name"]).name == "1.png"
    assert (first["height"], first["width"], first["image_id"]) == (50, 100, 1)
    assert [a["bbox"] for a in first["annotations"]] == [[10, 10, 20, 20], [-10, 5, 40, 60]]
    assert {a["bbox_mode"] for a in first["annotations"]} == {BoxMode.XYWH_ABS}
    assert [a["iscrowd"] for a in first["annotations"]] == [0, 1]
    assert second["annotations"] == []  # images without boxes stay
    assert messages() == []


def test_folders_may_be_addresses(write):
    content = content_of([(10, 10, 20, 20)])
    json_file, _ = write(content)
    names = [r["file_name"] for r in load_checked_coco_json(json_file, "shapes://val", NAME)]
    assert names == ["shapes://val/1.png", "shapes://val/2.png"]


def test_category_ids_with_gaps_become_contiguous_labels(write):
    names = {20: "bird", 3: "cat", 7: "dog"}
    content = content_of([(1, 1, 5, 5)] * 3)
    content["categories"] = [{"id": number, "name": name} for number, name in names.items()]
    for annotation, category in zip(content["annotations"], names, strict=True):
        annotation["category_id"] = category
    json_file, root = write(content)
    assert list(read_categories(json_file).items()) == sorted(names.items())
    register_coco_json(NAME, json_file, root, ["cat", "dog", "bird"])
    record = DatasetCatalog.get(NAME)[0]
    assert [a["category_id"] for a in record["annotations"]] == [2, 0, 1]
    assert MetadataCatalog.get(NAME).thing_classes == ["cat", "dog", "bird"]


def test_categories_are_read_again_when_the_file_changes(write):
    json_file, _ = write(content_of())
    assert read_categories(json_file) == {1: "cat", 2: "dog"}
    write(content_of(categories=[{"id": 1, "name": "lynx"}]))
    os.utime(json_file, (2e9, 2e9))  # both were written within one tick of the clock
    assert read_categories(json_file) == {1: "lynx"}


def test_registering_a_name_again_replaces_it_even_without_metadata(write):
    json_file, root = write(content_of())
    register_coco_json(NAME, "elsewhere.json", root, ["cat"])
    register_coco_json(NAME, json_file, root, ["cat", "dog"])
    assert len(DatasetCatalog.get(NAME)) == 2
    assert MetadataCatalog.get(NAME).json_file == json_file
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)
    DatasetCatalog.register(NAME, list)
    register_coco_json(NAME, json_file, root, ["cat", "dog"])
    assert len(DatasetCatalog.get(NAME)) == 2


def test_name_registered_by_another_program_is_not_replaced():
    DatasetCatalog.register("theirs", list)
    with pytest.raises(DataError, match="'theirs' is registered already, by Detectron2 or by"):
        register_coco_json("theirs", "boxes.json", "", ["cat"])


def test_file_is_first_read_when_the_data_set_is_used(tmp_path):
    register_coco_json(NAME, str(tmp_path / "later.json"), str(tmp_path), ["cat"])
    with pytest.raises(DataError, match=r"later\.json' does not exist"):
        DatasetCatalog.get(NAME)


BAD_BOXES = {
    (float("nan"), 1, 5, 5): "[nan, 1, 5, 5] (not finite)",
    (1, 1, 0, 5): "[1, 1, 0, 5] (no area)",
    (1, 1, 5, -5): "[1, 1, 5, -5] (no area)",
    (100, 10, 5, 5): "[100, 10, 5, 5] (outside the image)",  # begins where the image ends
    (-9, 10, 9, 5): "[-9, 10, 9, 5] (outside the image)",  # ends where it begins
}


def test_bad_boxes_are_dropped_with_one_warning(write, messages):
    first, second = load(write(content_of([*BAD_BOXES, (10, 10, 20, 20)])))
    assert [a["bbox"] for a in first["annotations"]] == [[10, 10, 20, 20]]
    assert second["annotations"] == []
    (message,) = messages()
    assert "boxes.json: 5 boxes" in message
    assert all(f"1.png {text}" in message for text in BAD_BOXES.values())


def test_warning_names_only_a_few_of_many_bad_boxes(write, messages):
    load(write(content_of([(1, 1, 0, 5)] * 30 + [(1, 1, 5, 5)])))
    (message,) = messages()
    assert "30 boxes" in message
    assert message.count("(no area)") == 5


@pytest.mark.parametrize("box", [[1, 2, 3], [1, 1, None, 5], [1, 1, "5", 5], "1 1 5 5"])
def test_malformed_box_is_refused(write, box):
    content = content_of()
    content["annotations"][1]["bbox"] = box
    with pytest.raises(DataError, match=r"boxes.json: annotations\[1\] has bbox .* four numbers"):
        load(write(content))


BAD_FILES = {
    "invalid JSON": ("{", "is not valid JSON"),
    "empty file": ("", "is not valid JSON"),
    "list": ([1, 2], "lacks images, annotations, categories"),
    "images not a list": (content_of(images={"1": "1.png"}), "lacks images;"),
    "no images key": (content_of(images=None), "lacks images;"),
    "no annotations key": (content_of(annotations=None), "lacks annotations;"),
    "no categories key": (content_of(categories=None), "lacks categories;"),
    "no images": (content_of(images=[], annotations=[]), "no images"),
    "no boxes": (content_of(annotations=[]), "no box that can be used"),
    "no usable box": (edited("annotations", bbox=[1, 1, 0, 0]), "no box that can be used"),
    "duplicate ids": (edited("annotations", id=5), "several annotations have the id 5"),
    "duplicate images": (edited("images", id=1), "several images have the id 1"),
    "unknown category": (edited("annotations", category_id=9), "category_id=9"),
    "no categories": (content_of(categories=[]), "empty list of categories"),
    "no class name": (without("categories", "name"), "categories[0] lacks name"),
    "no height": (without("images", "height"), "images[0] lacks height"),
    "no file name": (without("images", "file_name"), "images[0] lacks file_name"),
    "no id": (without("annotations", "id"), "annotations[0] lacks id"),
    "no image id": (without("annotations", "image_id"), "annotations[0] lacks image_id"),
    "no class": (without("annotations", "category_id"), "annotations[0] lacks category_id"),
    "no box": (without("annotations", "bbox"), "annotations[0] lacks bbox"),
    "null box": (edited("annotations", bbox=None), "annotations[0] lacks bbox"),
    "empty box": (edited("annotations", bbox=[]), "annotations[0] lacks bbox"),
}


@pytest.mark.parametrize("fault", BAD_FILES)
def test_message_names_the_file_and_its_fault(write, fault):
    content, expected = BAD_FILES[fault]
    with pytest.raises(DataError) as caught:
        load(write(content))
    assert "boxes.json" in str(caught.value)
    assert expected in str(caught.value)


@pytest.mark.parametrize("read", [read_categories, lambda path: load((path, ""))])
def test_message_names_a_missing_file(tmp_path, read):
    with pytest.raises(DataError, match=r"absent\.json.* does not exist"):
        read(str(tmp_path / "absent.json"))


def test_message_counts_missing_images_and_names_their_folder(write):
    paths = write(content_of(), images=["1.png"])
    with pytest.raises(DataError) as caught:
        load(paths)
    for part in ("1 of 2 images", "boxes.json", "2.png", paths[1]):
        assert part in str(caught.value)


@pytest.mark.parametrize(("folder", "split", "images", "boxes", "classes"), [
    ("bccd", "train", 203, 2944, 3), ("bccd", "val", 53, 770, 3),
    ("aquarium", "train", 418, 3052, 7), ("aquarium", "val", 107, 832, 7),
])  # fmt: skip
def test_real_data_sets_load_completely(folder, split, images, boxes, classes, messages):
    json_file = DATA / folder / "annotations" / f"instances_{split}.json"
    if not json_file.is_file():
        pytest.skip(f"{folder} is not on this machine")
    records = load((str(json_file), str(DATA / folder / "images" / split)))
    labels = [a["category_id"] for r in records for a in r["annotations"]]
    assert (len(records), len(labels)) == (images, boxes)
    assert set(labels) == set(range(classes))
    assert messages() == []
