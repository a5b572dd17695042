"""Batches of the loaders, and errors of datasets and images as they reach the user."""

import gc
import json
import multiprocessing
import os
import signal
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import write_coco
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_test_loader
from detectron2.utils import comm
from torch.utils.data._utils import signal_handling

from dsrcnn.config import read_cfg
from dsrcnn.data import build_test_loader, build_train_loader, register_coco_json
from dsrcnn.data.workers import set_up_worker
from dsrcnn.errors import DataError

NAME = "loader_under_test"


def cfg_of(*opts, name=NAME):
    sets = ["DATASETS.TRAIN", (name,), "DATASETS.TEST", (name,)]
    return read_cfg("quick/sparse_rcnn_shapes", [*sets, "SOLVER.IMS_PER_BATCH", 2, *opts])


@pytest.fixture
def two_images(tmp_path):
    """A dataset of two images, the second without boxes; returns their paths."""
    path = tmp_path / "cells.json"
    write_coco(path, tmp_path)
    content = json.loads(path.read_text())
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] == 1]
    path.write_text(json.dumps(content))
    register_coco_json(NAME, str(path), str(tmp_path), ["left", "right"])
    return [tmp_path / "1.jpg", tmp_path / "2.jpg"]


def test_training_batch_has_images_and_instances():
    cfg = cfg_of("INPUT.MAX_SIZE_TRAIN", 160, name="shapes_train")
    batch = next(iter(build_train_loader(cfg)))
    assert len(batch) == 2
    for sample in batch:
        assert set(sample) == {"file_name", "image_id", "height", "width", "image", "instances"}
        channels, height, width = sample["image"].shape
        assert (channels, sample["image"].dtype) == (3, torch.uint8)
        assert min(height, width) in cfg.INPUT.MIN_SIZE_TRAIN or max(height, width) == 160
        instances = sample["instances"]
        assert set(instances.get_fields()) == {"gt_boxes", "gt_classes"}
        assert instances.image_size == (height, width)
        assert len(instances) > 0
        assert set(instances.gt_classes.tolist()) <= set(range(5))
        corners = instances.gt_boxes.tensor[:, 2:]
        assert (corners <= torch.tensor([width, height])).all()


def test_test_batch_is_one_resized_image_without_annotations():
    cfg = cfg_of("INPUT.MIN_SIZE_TEST", 112, "INPUT.MAX_SIZE_TEST", 160, name="shapes_val")
    loader = build_test_loader(cfg, "shapes_val")
    assert len(loader) == 200
    for index, (sample,) in enumerate(islice(loader, 3)):
        assert set(sample) == {"file_name", "image_id", "height", "width", "image"}
        assert sample["image_id"] == index  # in order, each once
        assert min(sample["image"].shape[1:]) == 112


def test_images_without_boxes_are_used_unless_they_are_filtered(two_images):
    batch = next(iter(build_train_loader(cfg_of())))
    assert {Path(s["file_name"]) for s in batch} == set(two_images)
    assert sorted(len(s["instances"]) for s in batch) == [0, 2]
    batch = next(iter(build_train_loader(cfg_of("DATALOADER.FILTER_EMPTY_ANNOTATIONS", True))))
    assert {Path(s["file_name"]) for s in batch} == {two_images[0]}


@pytest.mark.parametrize("name", ["coco_2017_val", "coco_2017_train"])
def test_missing_coco_refers_to_the_page_that_helps(name):
    json_file = MetadataCatalog.get(name).json_file
    if Path(json_file).exists():
        pytest.skip("COCO is on this machine")
    for build in (build_train_loader, lambda c: build_test_loader(c, name)):
        with pytest.raises(DataError) as caught:
            build(cfg_of(name=name))
        for part in (name, json_file, "datasets/README.md", "DETECTRON2_DATASETS"):
            assert part in str(caught.value)


def test_message_names_an_empty_data_set():
    DatasetCatalog.register(NAME, list)
    with pytest.raises(DataError, match=f"{NAME} cannot be used: .* is empty"):
        build_test_loader(cfg_of(), NAME)


@pytest.mark.parametrize("train", [True, False], ids=["train", "test"])
def test_error_in_a_worker_arrives_as_its_plain_message(two_images, train, monkeypatch):
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

    text = message(workers=1)
    gc.collect()  # ends the worker while the patch holds
    assert text.startswith("Image ")
    assert any(str(path) in text for path in two_images)
    assert text.count("\n") == 0
    if not train:  # the first image, whichever process reads it
        assert text == message(workers=0)


def test_worker_does_not_wait_for_threads_of_its_parent():
    cv2.resize(np.zeros((2000, 2000, 3), np.uint8), (1500, 1500), interpolation=cv2.INTER_AREA)
    context = multiprocessing.get_context("fork")
    worker = context.Process(target=set_up_worker, args=(0,))
    worker.start()
    worker.join(timeout=30)
    alive = worker.is_alive()
    worker.kill()
    assert not alive


def shapes_test_loader(cfg):
    return build_test_loader(cfg, "shapes_val")


@pytest.mark.parametrize("build", [build_train_loader, shapes_test_loader])
def test_workers_import_what_they_need_where_they_are_not_forked(build):
    cfg = cfg_of("DATASETS.TEST", ("shapes_val",), "DATALOADER.NUM_WORKERS", 1, name="shapes_train")
    loader = build(cfg)
    loader.multiprocessing_context = "spawn"  # as on macOS
    assert next(iter(loader))[0]["image"].ndim == 3


@pytest.mark.parametrize("build", [build_train_loader, shapes_test_loader])
def test_workers_outlive_signals_from_the_moment_they_start(build, monkeypatch):
    handle = signal_handling._set_worker_signal_handlers

    def handle_and_receive():  # runs in the worker
        handle()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(signal_handling, "_set_worker_signal_handlers", handle_and_receive)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    cfg = cfg_of("DATASETS.TEST", ("shapes_val",), "DATALOADER.NUM_WORKERS", 2, name="shapes_train")
    batches = iter(build(cfg))
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
    for _ in range(3):
        assert next(batches)[0]["image"].ndim == 3


def test_a_test_loader_takes_its_part_of_the_images_as_detectron2_does(monkeypatch):
    for rank in (0, 1):
        monkeypatch.setattr(comm, "get_world_size", lambda: 2)
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        loader = build_test_loader(cfg_of(name="shapes_val"), "shapes_val")
        theirs = build_detection_test_loader(loader.dataset, mapper=None)
        assert [*loader.sampler] == [*theirs.sampler]
        assert loader.batch_size == theirs.batch_size == 1
