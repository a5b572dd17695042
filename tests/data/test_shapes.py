"""The synthetic dataset: reproducible, and with boxes that fit what is drawn."""

import hashlib
import json
import os
import sys

import numpy as np
import pytest
from conftest import run_program
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog, detection_utils

from dsrcnn.config import read_cfg
from dsrcnn.data.datasets import register_shapes, shapes
from dsrcnn.data.datasets.shapes import CLASSES, SPLITS, draw_scene, shapes_records

DRAWN = [("train", 0), ("train", 1999), ("val", 0), ("val", 123)]
FINGERPRINT = """
import hashlib, json
from dsrcnn.data.datasets.shapes import draw_scene, shapes_records
digest = hashlib.sha256(json.dumps(shapes_records("val")).encode())
for split, index in {drawn}:
    digest.update(draw_scene(split, index).tobytes())
print(digest.hexdigest())
"""


@pytest.fixture(scope="module")
def val_records():
    return shapes_records("val")


@pytest.fixture(scope="module")
def records(val_records):
    return {"val": val_records, "train": shapes_records("train")}


def boxes_of(record):
    return np.array([a["bbox"] for a in record["annotations"]])


def test_records_and_images_are_the_same_in_another_process(val_records):
    np.random.seed(5)  # has no effect
    digest = hashlib.sha256(json.dumps(val_records).encode())
    for split, index in DRAWN:
        digest.update(draw_scene(split, index).tobytes())
    command = [sys.executable, "-W", "ignore", "-c", FINGERPRINT.format(drawn=DRAWN)]
    printed = run_program(*command, env={**os.environ, "PYTHONHASHSEED": "7"})
    assert printed.split()[-1] == digest.hexdigest()


def test_splits_show_different_images():
    for index in range(10):
        train, val = draw_scene("train", index), draw_scene("val", index)
        assert train.shape != val.shape or (train != val).any()


@pytest.mark.parametrize("split", SPLITS)
def test_split_has_unique_names_and_every_class_and_image_size(records, split):
    for key in ("file_name", "image_id"):
        assert len({r[key] for r in records[split]}) == len(records[split]) == SPLITS[split]
    labels = {a["category_id"] for r in records[split] for a in r["annotations"]}
    assert labels == set(range(len(CLASSES)))
    sizes = {(r["height"], r["width"]) for r in records[split]}
    assert sizes == {(h, w) for h in (96, 112, 128) for w in (96, 112, 128)}
    fewest, most = shapes._OBJECTS
    assert all(fewest <= len(r["annotations"]) <= most for r in records[split])


@pytest.mark.parametrize("split", SPLITS)
def test_boxes_are_inside_the_image(records, split):
    for record in records[split]:
        boxes = boxes_of(record)
        assert (boxes[:, :2] >= 0).all(), record["file_name"]
        assert (boxes[:, 2:] <= [record["width"], record["height"]]).all(), record["file_name"]
        assert (boxes[:, 2:] > boxes[:, :2]).all(), record["file_name"]


def test_box_is_tight_on_the_pixels_its_shape_changes(val_records, monkeypatch):
    for index in range(25):
        scene = shapes._make_scene("val", index)
        # The state after the scene was made gives the same background for every drawing.
        state = scene.generator.bit_generator.state

        def draw(drawn, index=index, scene=scene, state=state):
            scene.generator.bit_generator.state = state
            part = scene._replace(shapes=drawn)
            monkeypatch.setattr(shapes, "_make_scene", lambda *_: part)
            image = draw_scene("val", index)
            monkeypatch.undo()
            return image

        background = draw([])
        for shape, annotation in zip(scene.shapes, val_records[index]["annotations"], strict=True):
            rows, columns = np.nonzero((draw([shape]) != background).any(axis=2))
            box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert annotation["bbox"] == box
            assert annotation["category_id"] == shape.label


def test_shapes_overlap_but_never_by_much(val_records):
    largest = []
    for record in val_records:
        masks = []
        for x1, y1, x2, y2 in boxes_of(record).astype(int):
            mask = np.zeros((record["height"], record["width"]), bool)
            mask[y1:y2, x1:x2] = True
            masks.append(mask)
        overlaps = [
            (a & b).sum() / min(a.sum(), b.sum()) for i, a in enumerate(masks) for b in masks[:i]
        ]
        largest.append(max(overlaps, default=0.0))
    assert max(largest) <= shapes._MAX_OVERLAP < 0.5  # of the smaller box
    assert np.mean(np.array(largest) > 0) > 0.1


def test_boxes_range_from_small_to_large(val_records):
    extents = [
        max(x2 - x1, y2 - y1) / min(record["height"], record["width"])
        for record in val_records
        for x1, y1, x2, y2 in boxes_of(record)
    ]
    low, high = shapes._EXTENT
    assert min(extents) < 1.3 * low
    assert max(extents) > 0.8 * high
    middle = np.sqrt(low * high)  # extents are uniform on a logarithmic scale
    assert 0.3 < np.mean(np.array(extents) < middle) < 0.8


def test_detectron2_opens_an_image_by_its_name(val_records):
    for record in val_records[:5]:
        image = draw_scene("val", record["image_id"])
        assert image.shape == (record["height"], record["width"], 3)
        read = detection_utils.read_image(record["file_name"], format="BGR")
        np.testing.assert_array_equal(read, image)
        read = detection_utils.read_image(record["file_name"], format="RGB")
        np.testing.assert_array_equal(read, image[:, :, ::-1])


def test_detectron2_mapper_accepts_the_records(val_records):
    cfg = read_cfg("quick/sparse_rcnn_shapes", ["INPUT.MIN_SIZE_TRAIN", (192,)])
    record = next(r for r in val_records if r["height"] == r["width"] == 96)
    sample = DatasetMapper(cfg, is_train=True)(record)
    assert sample["image"].shape == (3, 160, 160)  # MAX_SIZE_TRAIN
    assert len(sample["instances"]) == len(record["annotations"])


def test_registering_twice_is_safe():
    register_shapes()
    register_shapes()
    assert {"shapes_train", "shapes_val"} <= set(DatasetCatalog.list())
    assert MetadataCatalog.get("shapes_val").thing_classes == CLASSES
