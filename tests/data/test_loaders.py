"""Batches, and errors of data sets and images as they reach the user."""

import gc
import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from dsrcnn.config import read_cfg
from dsrcnn.data import build_test_loader, build_train_loader, register_coco_json
from dsrcnn.errors import DataError

NAME = "loader_under_test"
QUICK = "quick/sparse_rcnn_shapes"


def cfg_of(*opts, name=NAME):
    sets = ["DATASETS.TRAIN", (name,), "DATASETS.TEST", (name,)]
    return read_cfg(QUICK, [*sets, "SOLVER.IMS_PER_BATCH", 2, *opts])


@pytest.fixture
def two_images(tmp_path):
    """A data set of two images, one without boxes; returns their paths."""
    paths = [tmp_path / "boxed.png", tmp_path / "empty.png"]
    for path in paths:
        Image.fromarray(np.zeros((50, 100, 3), np.uint8)).save(path)
    content = {
        "images": [
            {"id": i, "file_name": p.name, "height": 50, "width": 100} for i, p in enumerate(paths)
        ],
        "annotations": [{"id": 1, "image_id": 0, "category_id": 1, "bbox": [1, 1, 20, 20]}],
        "categories": [{"id": 1, "name": "cell"}],
    }
    (tmp_path / "cells.json").write_text(json.dumps(content))
    register_coco_json(NAME, str(tmp_path / "cells.json"), str(tmp_path), ["cell"])
    yield paths
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def test_a_training_batch_of_shapes_is_what_the_model_expects():
    cfg = cfg_of("INPUT.MAX_SIZE_TRAIN", 160, name="shapes_train")
    batch = next(iter(build_train_loader(cfg)))
    assert len(batch) == 2
    for sample in batch:
        assert set(sample) == {"file_name", "image_id", "height", "width", "image", "instances"}
        channels, height, width = sample["image"].shape
        assert channels == 3
        assert sample["image"].dtype == torch.uint8
        assert min(height, width) in cfg.INPUT.MIN_SIZE_TRAIN or max(height, width) == 160
        instances = sample["instances"]
        assert set(instances.get_fields()) == {"gt_boxes", "gt_classes"}
        assert instances.image_size == (height, width)
        assert len(instances) > 0
        assert set(instances.gt_classes.tolist()) <= set(range(5))
        corners = instances.gt_boxes.tensor[:, 2:]
        assert (corners <= torch.tensor([width, height])).all()


def test_a_test_batch_of_shapes_is_one_resized_image_without_annotations():
    cfg = cfg_of("INPUT.MIN_SIZE_TEST", 112, "INPUT.MAX_SIZE_TEST", 160, name="shapes_val")
    loader = build_test_loader(cfg, "shapes_val")
    assert len(loader) == 200
    for index, batch in enumerate(islice(loader, 3)):
        (sample,) = batch
        assert set(sample) == {"file_name", "image_id", "height", "width", "image"}
        assert sample["image_id"] == index  # in order, each once
        assert min(sample["image"].shape[1:]) == 112


def test_images_without_boxes_are_trained_on(two_images):
    batch = next(iter(build_train_loader(cfg_of())))
    assert {Path(s["file_name"]) for s in batch} == set(two_images)
    assert sorted(len(s["instances"]) for s in batch) == [0, 1]


def test_images_without_boxes_are_left_out_on_request(two_images):
    batch = next(iter(build_train_loader(cfg_of("DATALOADER.FILTER_EMPTY_ANNOTATIONS", True))))
    assert {Path(s["file_name"]) for s in batch} == {two_images[0]}


@pytest.mark.parametrize("name", ["coco_2017_val", "coco_2017_train"])
def test_coco_that_is_not_on_this_machine_names_the_page_that_helps(name):
    json_file = MetadataCatalog.get(name).json_file
    if Path(json_file).exists():
        pytest.skip("COCO is on this machine")
    cfg = cfg_of(name=name)
    for build in (build_train_loader, lambda c: build_test_loader(c, name)):
        with pytest.raises(DataError) as caught:
            build(cfg)
        for part in (name, json_file, "datasets/README.md", "DETECTRON2_DATASETS"):
            assert part in str(caught.value)


def test_a_data_set_with_nothing_in_it_is_named():
    DatasetCatalog.register(NAME, list)
    try:
        with pytest.raises(DataError, match=f"{NAME} cannot be used: .* is empty"):
            build_test_loader(cfg_of(), NAME)
    finally:
        DatasetCatalog.remove(NAME)


def test_one_unregistered_name_among_several_is_found(two_images):
    cfg = cfg_of("DATASETS.TRAIN", (NAME, "loader_under_tests"))
    with pytest.raises(DataError, match=f"Did you mean {NAME}"):
        build_train_loader(cfg)


@pytest.mark.parametrize("train", [True, False], ids=["train", "test"])
def test_an_error_in_a_worker_arrives_as_its_plain_message(two_images, train, monkeypatch):
    # torch waits this long for the worker of an endless loader that raised: 5 seconds by default
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1, raising=False)
    for path in two_images:
        path.write_bytes(b"no image")

    def message(workers):
        cfg = cfg_of("DATALOADER.NUM_WORKERS", workers)
        loader = build_train_loader(cfg) if train else build_test_loader(cfg, NAME)
        with pytest.raises(DataError) as caught:
            next(iter(loader))
        return str(caught.value)

    found = message(workers=1)
    gc.collect()  # ends the worker while the patch holds
    assert "Traceback" not in found
    assert found.startswith("Image ")
    assert any(str(path) in found for path in two_images)
    assert found.count("\n") == 0
    if not train:  # the first image, whichever process reads it
        assert found == message(workers=0)
