"""Detectors: what they are loaded from, evaluation, training."""

import pytest
import torch
from comparing import same
from conftest import ANIMALS, save_model, tiny_cfg, write_coco
from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_coco_instances

import dsrcnn
from dsrcnn.errors import ConfigError, DataError, WeightsError


def test_a_detector_is_fine_tuned_and_evaluated_on_a_folder(tmp_path):
    for split in ("train", "val"):
        folder = tmp_path / "cells"
        names = (folder / f"annotations/instances_{split}.json", folder / f"images/{split}")
        write_coco(*names, 3, seed=int(split == "val"))
    opts = ("SOLVER.IMS_PER_BATCH", 2, "INPUT.MIN_SIZE_TRAIN", (64,), "LOG.IMAGES", 0)
    save_model(tmp_path / "model.pth", *opts)
    detector = dsrcnn.load(tmp_path / "model.pth", device="cpu")
    overrides = {"SOLVER.MAX_ITER": 2, "TEST.EVAL_PERIOD": 0, "SOLVER.STEPS": (1,)}
    trained = detector.train(folder, output=str(tmp_path / "out"), **overrides)
    assert trained.classes == ["left", "right"]
    assert (tmp_path / "out/model_final.pth").is_file()
    assert "AP-left" in trained.evaluate(folder)["bbox"]
    assert detector.classes == ANIMALS  # the first one stays as it was


def test_a_run_folder_a_weight_file_and_a_config_with_weights_are_the_same_model(
    tmp_path, model_file, photos
):
    run = tmp_path / "run"
    run.mkdir()
    cfg = save_model(run / "model_final.pth")
    (run / "config.yaml").write_text(cfg.dump())
    expected = dsrcnn.load(model_file, device="cpu").predict(photos / "a.png", threshold=0)
    state = torch.load(model_file)["model"]
    bare = tmp_path / "bare.pth"
    torch.save(state, bare)
    for model, weights in ((run, None), (run / "config.yaml", bare)):
        detector = dsrcnn.load(model, weights, device="cpu")
        same(detector.predict(photos / "a.png", threshold=0), expected)
    assert detector.classes == ["0", "1", "2", "3", "4"]  # the file does not say
    with pytest.raises(WeightsError, match=r"nowhere.pth"):
        dsrcnn.load(run, device="cpu", opts=["MODEL.WEIGHTS", "nowhere.pth"])
    for more in ({"weights": bare}, {"opts": ["MODEL.WEIGHTS", str(bare)]}):
        with pytest.raises(ConfigError, match="is a weight file, so other weights are too many"):
            dsrcnn.load(model_file, device="cpu", **more)


def test_a_detector_is_evaluated_on_the_data_of_its_run(tmp_path, model_file):
    run = tmp_path / "run"
    run.mkdir()
    save_model(run / "model_final.pth")
    annotations, images = tmp_path / "val.json", tmp_path / "images"
    write_coco(annotations, images, classes=ANIMALS)
    data = {"TEST_JSON": str(annotations), "TEST_IMAGES": str(images), "NAME": "of_the_run"}
    opts = [word for key, value in data.items() for word in (f"DATASETS.CUSTOM.{key}", value)]
    cfg = tiny_cfg("INPUT.MIN_SIZE_TEST", 64, "DATASETS.TRAIN", (), *opts)
    (run / "config.yaml").write_text(cfg.dump())
    metrics = dsrcnn.load(run, device="cpu").evaluate(**{"OUTPUT_DIR": str(run)})
    assert "AP-cat" in metrics["bbox"]
    with pytest.raises(DataError, match="There is no test set; give a folder"):
        dsrcnn.load(model_file, device="cpu").evaluate(**{"DATASETS.TEST": ()})


@pytest.mark.parametrize("names", [["cat", "dog"], [*ANIMALS[::-1]]])
@pytest.mark.parametrize("kind", ["folder", "files", "registered"])
def test_evaluation_on_other_classes_is_refused(names, kind, tmp_path, detector):
    folder = tmp_path / "others"
    path, images = folder / "annotations/instances_val.json", folder / "images/val"
    write_coco(path, images, classes=names)
    data, overrides = None, {}
    if kind == "folder":
        data, overrides = folder, {"DATASETS.CUSTOM.TRAIN_SPLIT": ""}
    elif kind == "files":
        entries = {"NAME": tmp_path.name, "TEST_JSON": str(path), "TEST_IMAGES": str(images)}
        overrides = {f"DATASETS.CUSTOM.{key}": value for key, value in entries.items()}
    else:
        register_coco_instances(tmp_path.name, {}, str(path), str(images))
        overrides = {"DATASETS.TEST": (tmp_path.name,)}
    with pytest.raises((DataError, ConfigError), match="class"):
        detector.evaluate(data, **overrides)
    if kind == "registered":
        DatasetCatalog.remove(tmp_path.name)


def test_classes_of_other_names_are_the_same_if_the_caller_says_so(tmp_path, detector):
    folder, names = tmp_path / "others", [*ANIMALS[1:], ANIMALS[0]]
    write_coco(folder / "annotations/instances_val.json", folder / "images/val", classes=names)
    overrides = {"DATASETS.CUSTOM.TRAIN_SPLIT": "", "DATASETS.CUSTOM.CLASSES": ()}
    assert "AP-dog" in detector.evaluate(folder, **overrides)["bbox"]


def test_evaluation_writes_to_the_run_folder_even_if_moved_and_never_to_the_working_folder(
    tmp_path, monkeypatch
):
    write_coco(tmp_path / "val.json", tmp_path / "images", classes=ANIMALS)
    data = {
        "DATASETS.CUSTOM.TEST_JSON": str(tmp_path / "val.json"),
        "DATASETS.CUSTOM.TEST_IMAGES": str(tmp_path / "images"),
        "DATASETS.CUSTOM.NAME": "written_where",
    }
    run, working = tmp_path / "run", tmp_path / "working"
    run.mkdir()
    working.mkdir()
    monkeypatch.chdir(working)
    cfg = save_model(run / "model_final.pth", "OUTPUT_DIR", "first/place")
    (run / "config.yaml").write_text(cfg.dump())
    moved = run.rename(tmp_path / "moved")
    detector = dsrcnn.load("../moved", device="cpu")
    monkeypatch.chdir(tmp_path)
    detector.evaluate(**data)
    monkeypatch.chdir(working)
    assert (moved / "inference").is_dir()
    (moved / "inference").rename(tmp_path / "seen")
    dsrcnn.load(moved / "model_final.pth", device="cpu").evaluate(**data)
    chosen = dsrcnn.load(moved / "model_final.pth", device="cpu", opts=["OUTPUT_DIR", "chosen"])
    assert sorted(p.name for p in moved.iterdir()) == ["config.yaml", "model_final.pth"]
    assert not [*working.iterdir()]
    chosen.evaluate(**data)
    assert (working / "chosen/inference").is_dir()
    dsrcnn.load(moved, device="cpu").evaluate(**data, **{"OUTPUT_DIR": "other"})
    assert (working / "other/inference").is_dir()
    assert not (moved / "inference").exists()


def test_averaged_weights_and_safetensors_are_read(tmp_path, photos, model_file):
    from safetensors.torch import save_file

    content = torch.load(model_file)
    config = tmp_path / "config.yaml"
    config.write_text(content["config"])
    packed = {k: v.contiguous() for k, v in content["model"].items()}
    save_file(packed, tmp_path / "model.safetensors")
    zeros = {k: torch.zeros_like(v) for k, v in content["model"].items()}
    averaged = {"model": zeros, "ema": {"model": content["model"]}}
    torch.save(averaged, tmp_path / "model.pth")
    expected = dsrcnn.load(model_file, device="cpu").predict(photos / "a.png", threshold=0)
    for name, opts in (("model.safetensors", []), ("model.pth", ["MODEL.EMA.ENABLED", True])):
        detector = dsrcnn.load(config, tmp_path / name, device="cpu", opts=opts)
        same(detector.predict(photos / "a.png", threshold=0), expected)


def test_the_number_of_classes_comes_from_the_weights_if_the_config_leaves_it_to_the_data(
    tmp_path, photos, model_file
):
    content = torch.load(model_file)
    config = tmp_path / "config.yaml"
    config.write_text(content["config"].replace("NUM_CLASSES: 5", "NUM_CLASSES: 0"))
    detector = dsrcnn.load(config, model_file, device="cpu")
    assert detector.classes == ANIMALS
    del content["classes"]
    torch.save(content, tmp_path / "bare.pth")
    with pytest.raises(ConfigError, match=r"NUM_CLASSES is 0, from the data, and .* has no class"):
        dsrcnn.load(config, tmp_path / "bare.pth")


def test_names_of_the_coco_classes_are_known_to_owners_of_official_weights(tmp_path):
    opts = ["MODEL.SparseRCNN.NUM_CLASSES", 80]
    cfg = save_model(tmp_path / "model.pth", *opts)
    state = torch.load(tmp_path / "model.pth")["model"]
    torch.save({"model": state}, tmp_path / "official.pth")
    (tmp_path / "config.yaml").write_text(cfg.dump())
    detector = dsrcnn.load(tmp_path / "config.yaml", tmp_path / "official.pth", device="cpu")
    assert detector.classes[:3] == ["person", "bicycle", "car"]


@pytest.mark.parametrize(("model", "weights", "error", "words"), [
    ("no_such_model", None, ConfigError, "Config file 'no_such_model' does not exist"),
    ("coco/sparse_rcnn_R50_100pro_3x", None, ConfigError, "is a config; give weights, too"),
    ("{tmp}", None, ConfigError, "config.yaml does not exist. Give the output folder"),
    ("model.onnx", None, ConfigError, "is an exported one; write dsrcnn.load_exported"),
    ("model.pt2", None, ConfigError, "is an exported one, which torch loads without dsrcnn"),
    ("{tmp}/missing.pth", None, WeightsError, "do not exist"),
    ("{tmp}/bare.pth", None, WeightsError, "has weights but no config"),
    ("coco/sparse_rcnn_R50_100pro_3x", "{tmp}/bare.pth", WeightsError, "weights do not fit"),
])  # fmt: skip
def test_models_that_cannot_be_loaded_are_one_error(tmp_path, model, weights, error, words):
    torch.save({"model": {"a": torch.zeros(3)}}, tmp_path / "bare.pth")
    paths = [x and x.format(tmp=tmp_path) for x in (model, weights)]
    with pytest.raises(error, match=words):
        dsrcnn.load(*paths, device="cpu")
