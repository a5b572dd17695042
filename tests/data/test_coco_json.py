"""COCO files: labels, faults named once and in plain words, the two real data sets."""

import copy
import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image

from dsrcnn.data import register_coco_json
from dsrcnn.data.datasets.coco import load_checked_coco_json, read_categories
from dsrcnn.errors import DataError

pytestmark = pytest.mark.usefixtures("clean_catalogs")

NAME = "json_under_test"
DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


def content_of(boxes=((10, 10, 20, 20), (5, 5, 10, 10))):
    """Two images of 100 x 50, all `boxes` (xywh) on the first, in classes 1 and 2 in turn."""
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "height": 50, "width": 100} for i in (1, 2)],
        "annotations": [
            {"id": i, "image_id": 1, "category_id": 1 + i % 2, "bbox": list(box), "iscrowd": 0}
            for i, box in enumerate(boxes)
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }


@pytest.fixture
def write(tmp_path):
    """Writes a COCO file with its images; returns the paths of both."""

    def write(content, images=("1.png", "2.png")):
        for name in images:
            Image.fromarray(np.zeros((50, 100, 3), np.uint8)).save(tmp_path / name)
        path = tmp_path / "boxes.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path), str(tmp_path)

    return write


@pytest.fixture
def warnings_of_package(caplog, monkeypatch):
    """Warnings this package logged; set up loggers no longer propagate, so ours is made to."""
    monkeypatch.setattr(logging.getLogger("dsrcnn"), "propagate", True)
    return lambda: [
        r
        for r in caplog.records
        if r.levelno >= logging.WARNING and r.name.startswith("dsrcnn.data")
    ]


def load(paths):
    return load_checked_coco_json(*paths, NAME)


# What is read


def test_records_are_in_detectron2s_format(write):
    first, second = load(write(content_of()))
    assert Path(first["file_name"]).name == "1.png"
    assert (first["height"], first["width"], first["image_id"]) == (50, 100, 1)
    assert [a["bbox"] for a in first["annotations"]] == [[10, 10, 20, 20], [5, 5, 10, 10]]
    assert {a["bbox_mode"] for a in first["annotations"]} == {BoxMode.XYWH_ABS}
    assert second["annotations"] == []  # images without boxes stay


def test_category_ids_with_gaps_become_contiguous_labels(write):
    content = content_of([(1, 1, 5, 5)] * 3)
    content["categories"] = [
        {"id": 20, "name": "bird"},
        {"id": 3, "name": "cat"},
        {"id": 7, "name": "dog"},
    ]
    for annotation, category in zip(content["annotations"], (20, 3, 7), strict=True):
        annotation["category_id"] = category
    json_file, root = write(content)
    names = [c["name"] for c in read_categories(json_file)]
    assert names == ["cat", "dog", "bird"]  # ascending by id, as Detectron2 counts
    register_coco_json(NAME, json_file, root, names)
    record = DatasetCatalog.get(NAME)[0]
    assert [a["category_id"] for a in record["annotations"]] == [2, 0, 1]
    assert MetadataCatalog.get(NAME).thing_classes == names


def test_categories_are_read_again_when_the_file_changes(write):
    json_file, _ = write(content_of())
    assert [c["name"] for c in read_categories(json_file)] == ["cat", "dog"]
    content = content_of()
    content["categories"][0]["name"] = "lynx"
    write(content)
    os.utime(json_file, (2e9, 2e9))  # both were written within one tick of the clock
    assert [c["name"] for c in read_categories(json_file)] == ["lynx", "dog"]


def test_registering_a_name_again_replaces_it(write, tmp_path):
    json_file, root = write(content_of())
    register_coco_json(NAME, "elsewhere.json", root, ["cat"])
    register_coco_json(NAME, json_file, root, ["cat", "dog"])
    assert len(DatasetCatalog.get(NAME)) == 2
    assert MetadataCatalog.get(NAME).json_file == json_file


def test_a_name_registered_without_metadata_is_replaced(write):
    json_file, root = write(content_of())
    DatasetCatalog.register(NAME, list)
    register_coco_json(NAME, json_file, root, ["cat", "dog"])
    assert len(DatasetCatalog.get(NAME)) == 2


def test_a_file_is_first_read_when_the_data_set_is_used(tmp_path):
    register_coco_json(NAME, str(tmp_path / "later.json"), str(tmp_path), ["cat"])
    with pytest.raises(DataError, match=r"later\.json' does not exist"):
        DatasetCatalog.get(NAME)


# Boxes that cannot be used


def test_bad_boxes_are_left_out_with_one_warning_that_names_them(write, warnings_of_package):
    boxes = [
        (float("nan"), 1, 5, 5),
        (10, 10, 20, 20),
        (1, 1, 0, 5),
        (1, 1, 5, -5),
        (100, 10, 5, 5),  # begins where the image ends
        (-9, 10, 9, 5),  # ends where it begins
    ]
    first, second = load(write(content_of(boxes)))
    assert [a["bbox"] for a in first["annotations"]] == [[10, 10, 20, 20]]
    assert second["annotations"] == []
    (warning,) = warnings_of_package()
    message = warning.getMessage()
    for part in (
        "boxes.json: 5 boxes",
        "1.png [nan, 1, 5, 5] (not finite)",
        "1.png [1, 1, 0, 5] (no area)",
        "1.png [1, 1, 5, -5] (no area)",
        "1.png [100, 10, 5, 5] (outside the image)",
        "1.png [-9, 10, 9, 5] (outside the image)",
    ):
        assert part in message


def test_a_warning_names_only_a_few_of_many_bad_boxes(write, warnings_of_package):
    load(write(content_of([(1, 1, 0, 5)] * 30 + [(1, 1, 5, 5)])))
    (warning,) = warnings_of_package()
    assert "30 boxes" in warning.getMessage()
    assert warning.getMessage().count("(no area)") == 5


@pytest.mark.parametrize("box", [[1, 2, 3], [1, 1, None, 5], [1, 1, "5", 5], "1 1 5 5"])
def test_a_malformed_box_is_left_out_with_a_warning(write, warnings_of_package, box):
    content = content_of()
    content["annotations"][1]["bbox"] = box
    records = load(write(content))
    assert [len(r["annotations"]) for r in records] == [1, 0]
    (warning,) = warnings_of_package()
    assert "1.png" in warning.getMessage()


def test_good_files_load_without_a_warning(write, warnings_of_package):
    load(write(content_of()))
    assert warnings_of_package() == []


def test_boxes_over_the_border_and_crowds_stay(write, warnings_of_package):
    content = content_of([(-10, -10, 40, 40), (90, 40, 50, 50)])
    content["annotations"][1]["iscrowd"] = 1
    first, _ = load(write(content))
    assert [a["bbox"] for a in first["annotations"]] == [[-10, -10, 40, 40], [90, 40, 50, 50]]
    assert [a["iscrowd"] for a in first["annotations"]] == [0, 1]
    assert warnings_of_package() == []


# Files that cannot be used


def edited(**replaced):
    content = content_of()
    content.update(replaced)
    return {k: v for k, v in content.items() if v is not None}


def with_annotations(**changed):
    content = copy.deepcopy(content_of())
    for annotation in content["annotations"]:
        annotation.update(changed)
    return content


def without(part, key):
    content = content_of()
    for entry in content[part]:
        del entry[key]
    return content


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param("{", "is not valid JSON", id="invalid JSON"),
        pytest.param("", "is not valid JSON", id="empty file"),
        pytest.param([1, 2], "lacks images, annotations, categories", id="a list"),
        pytest.param(edited(images={"1": "1.png"}), "lacks images;", id="images not a list"),
        pytest.param(edited(images=None), "lacks images;", id="no images key"),
        pytest.param(edited(annotations=None), "lacks annotations;", id="no annotations key"),
        pytest.param(edited(categories=None), "lacks categories;", id="no categories key"),
        pytest.param(edited(images=[], annotations=[]), "no images", id="no images"),
        pytest.param(edited(annotations=[]), "no box that can be used", id="no boxes"),
        pytest.param(with_annotations(bbox=[1, 1, 0, 0]), "no box that can", id="no usable box"),
        pytest.param(
            with_annotations(id=5),
            "annotations have the id 5",
            id="duplicate annotation ids",
        ),
        pytest.param(with_annotations(category_id=9), "category_id=9", id="unknown category"),
        pytest.param(edited(categories=[]), "empty list of categories", id="no categories"),
        pytest.param(without("categories", "name"), "categories[0] lacks name", id="no class name"),
        pytest.param(without("images", "height"), "images[0] lacks height", id="no image height"),
        pytest.param(
            without("images", "file_name"), "images[0] lacks file_name", id="no file name"
        ),
        pytest.param(without("annotations", "id"), "annotations[0] lacks id", id="no id"),
        pytest.param(without("annotations", "image_id"), "lacks image_id", id="no image id"),
        pytest.param(without("annotations", "category_id"), "lacks category_id", id="no class"),
        pytest.param(without("annotations", "bbox"), "annotations[0] lacks bbox", id="no box"),
        pytest.param(with_annotations(bbox=None), "annotations[0] lacks bbox", id="null box"),
        pytest.param(with_annotations(bbox=[]), "annotations[0] lacks bbox", id="empty box"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_its_fault(write, content, expected):
    with pytest.raises(DataError) as caught:
        load(write(content))
    assert "boxes.json" in str(caught.value)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("categories", "expected"), [([], "empty list of categories"), ([{"id": 1}], "lacks name")]
)
def test_categories_that_cannot_be_used_are_named_with_the_file(write, categories, expected):
    json_file, _ = write(edited(categories=categories))
    with pytest.raises(DataError, match=expected) as caught:
        read_categories(json_file)
    assert "boxes.json" in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    path = tmp_path / "absent.json"
    for read in (read_categories, lambda p: load((p, str(tmp_path)))):
        with pytest.raises(DataError, match=r"absent\.json.* does not exist"):
            read(str(path))


def test_missing_images_are_counted_and_named_with_their_folder(write):
    paths = write(content_of(), images=["1.png"])
    with pytest.raises(DataError) as caught:
        load(paths)
    for part in ("1 of 2 images", "boxes.json", "2.png", paths[1]):
        assert part in str(caught.value)


# Real data


@pytest.mark.parametrize(
    ("folder", "split", "images", "boxes", "classes"),
    [
        ("bccd", "train", 203, 2944, 3),
        ("bccd", "val", 53, 770, 3),
        ("aquarium", "train", 418, 3052, 7),
        ("aquarium", "val", 107, 832, 7),
    ],
)
def test_real_data_sets_load_whole(folder, split, images, boxes, classes, warnings_of_package):
    json_file = DATA / folder / "annotations" / f"instances_{split}.json"
    if not json_file.is_file():
        pytest.skip(f"{folder} is not on this machine")
    root = DATA / folder / "images" / split
    register_coco_json(
        NAME, str(json_file), str(root), [c["name"] for c in read_categories(str(json_file))]
    )
    records = DatasetCatalog.get(NAME)
    labels = [a["category_id"] for r in records for a in r["annotations"]]
    assert (len(records), len(labels)) == (images, boxes)
    assert set(labels) == set(range(classes))
    assert warnings_of_package() == []
