"""One's own data from the config alone, and the rule that ties classes to the model."""

import json
import os

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from PIL import Image

from dsrcnn import load_cfg
from dsrcnn.config import check_config, read_cfg
from dsrcnn.data import build_test_loader, build_train_loader, use_custom_data
from dsrcnn.data.datasets import class_names, resolve_num_classes
from dsrcnn.errors import ConfigError, DataError

pytestmark = pytest.mark.usefixtures("clean_catalogs")

QUICK = "quick/sparse_rcnn_shapes"  # its NUM_CLASSES is 0
NUM_CLASSES = "MODEL.SparseRCNN.NUM_CLASSES"


@pytest.fixture
def write(tmp_path):
    def write(name="cells.json", classes=("red", "white")):
        Image.fromarray(np.zeros((50, 100, 3), np.uint8)).save(tmp_path / "1.png")
        content = {
            "images": [{"id": 1, "file_name": "1.png", "height": 50, "width": 100}],
            "annotations": [{"id": 1, "image_id": 1, "category_id": 5, "bbox": [1, 1, 9, 9]}],
            "categories": [{"id": 5 + i, "name": c} for i, c in enumerate(classes)],
        }
        (tmp_path / name).write_text(json.dumps(content))
        return str(tmp_path / name)

    return write


def custom(train="", test="", name="toy", images=""):
    """Overrides that set DATASETS.CUSTOM."""
    keys = {
        "NAME": name,
        "TRAIN_JSON": train,
        "TRAIN_IMAGES": images,
        "TEST_JSON": test,
        "TEST_IMAGES": images,
    }
    return [word for key, value in keys.items() for word in (f"DATASETS.CUSTOM.{key}", value)]


# DATASETS.CUSTOM


def test_both_files_become_the_data_sets_of_the_config(write, tmp_path):
    cfg = load_cfg(
        QUICK, custom(write("a.json"), write("b.json"), name="cells", images=str(tmp_path))
    )
    assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == (("cells_train",), ("cells_test",))
    assert cfg.DATASETS.CUSTOM.CLASSES == ("red", "white")
    assert MetadataCatalog.get("cells_test").thing_classes == ["red", "white"]
    assert DatasetCatalog.get("cells_train")[0]["file_name"] == str(tmp_path / "1.png")
    assert cfg.MODEL.SparseRCNN.NUM_CLASSES == 2


def test_a_file_that_is_not_given_leaves_its_split_empty(write):
    path = write()
    only_test = load_cfg(QUICK, custom(test=path))
    assert (only_test.DATASETS.TRAIN, only_test.DATASETS.TEST) == ((), ("toy_test",))
    only_train = load_cfg(QUICK, custom(train=path))
    assert (only_train.DATASETS.TRAIN, only_train.DATASETS.TEST) == (("toy_train",), ())


def test_without_custom_data_the_config_is_not_touched():
    cfg = read_cfg(QUICK)
    before = cfg.dump()
    use_custom_data(cfg)
    assert cfg.dump() == before


def test_the_same_config_can_be_loaded_twice(write):
    opts = custom(write())
    assert load_cfg(QUICK, opts).dump() == load_cfg(QUICK, opts).dump()


def test_a_json_without_a_name_asks_for_one(write):
    for opts in (custom(write(), name=""), custom(test=write(), name="")):
        with pytest.raises(ConfigError, match=r"write DATASETS\.CUSTOM\.NAME, for example cells\."):
            load_cfg(QUICK, opts)


def test_a_name_without_a_json_asks_for_one():
    with pytest.raises(ConfigError, match=r"write DATASETS\.CUSTOM\.TRAIN_JSON or TEST_JSON"):
        load_cfg(QUICK, custom())


def test_a_json_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(DataError, match=r"absent\.json' does not exist"):
        load_cfg(QUICK, custom(str(tmp_path / "absent.json")))


@pytest.mark.parametrize("others", [("red", "blue"), ("white", "red"), ("red",)])
def test_train_and_test_files_with_different_classes_are_named(write, others):
    opts = custom(write("a.json"), write("b.json", others))
    with pytest.raises(DataError) as caught:
        load_cfg(QUICK, opts)
    for part in ("a.json", "b.json", "red, white", ", ".join(others)):
        assert part in str(caught.value)


# A saved config, elsewhere


def test_a_saved_config_knows_its_classes_where_the_files_are_gone(write, tmp_path):
    path = write()
    saved = tmp_path / "config.yaml"
    saved.write_text(load_cfg(QUICK, custom(path, path)).dump())
    (tmp_path / "cells.json").unlink()
    MetadataCatalog.pop("toy_test")
    DatasetCatalog.remove("toy_test")
    cfg = load_cfg(saved)
    assert MetadataCatalog.get(cfg.DATASETS.TEST[0]).thing_classes == ["red", "white"]
    assert cfg.MODEL.SparseRCNN.NUM_CLASSES == 2
    with pytest.raises(DataError, match=r"cells\.json' does not exist"):
        build_test_loader(cfg, "toy_test")


def test_a_saved_config_evaluates_where_only_the_test_file_is(write, tmp_path):
    saved = tmp_path / "config.yaml"
    cfg = load_cfg(QUICK, custom(write("a.json"), write("b.json"), images=str(tmp_path)))
    saved.write_text(cfg.dump())
    (tmp_path / "a.json").unlink()
    cfg = load_cfg(saved)
    assert len(build_test_loader(cfg, "toy_test")) == 1
    write("b.json", ("white", "red"))
    os.utime(tmp_path / "b.json", (2e9, 2e9))  # both were written within one tick of the clock
    with pytest.raises(DataError, match=r"CLASSES and .* name different classes: red, white"):
        load_cfg(saved)


def test_data_of_other_classes_than_the_saved_ones_are_refused(write):
    path = write(classes=("white", "red"))
    saved = ["DATASETS.CUSTOM.CLASSES", ("red", "white")]
    with pytest.raises(DataError, match=r"red, white against white, red.*CLASSES \(\)"):
        load_cfg(QUICK, [*custom(test=path), *saved])
    cfg = load_cfg(QUICK, [*custom(test=path), "DATASETS.CUSTOM.CLASSES", ()])
    assert cfg.DATASETS.CUSTOM.CLASSES == ("white", "red")


# NUM_CLASSES


def test_num_classes_zero_is_the_number_of_the_data():
    cfg = read_cfg(QUICK)
    assert cfg.MODEL.SparseRCNN.NUM_CLASSES == 0
    resolve_num_classes(cfg)
    assert cfg.MODEL.SparseRCNN.NUM_CLASSES == 5


def test_num_classes_zero_is_taken_from_the_test_set_where_there_is_no_training_set():
    cfg = read_cfg(QUICK, ["DATASETS.TRAIN", ()])
    resolve_num_classes(cfg)
    assert cfg.MODEL.SparseRCNN.NUM_CLASSES == 5


def test_the_right_number_of_classes_is_accepted():
    assert load_cfg(QUICK, [NUM_CLASSES, 5]).MODEL.SparseRCNN.NUM_CLASSES == 5


def test_a_wrong_number_of_classes_is_one_error_that_says_what_to_write(write):
    with pytest.raises(ConfigError) as caught:
        load_cfg(QUICK, [*custom(write()), NUM_CLASSES, 80])
    for part in ("80", "toy_train", "2 classes (red, white)", f"Write {NUM_CLASSES} 2,", "or 0"):
        assert part in str(caught.value)


def test_a_test_set_of_another_number_of_classes_is_refused():
    with pytest.raises(ConfigError, match="'coco_2017_val' has 80 classes"):
        load_cfg(QUICK, ["DATASETS.TEST", ("coco_2017_val",)])


def test_coco_has_eighty_classes_where_its_files_are_absent():
    assert len(class_names("coco_2017_train")) == 80


def test_classes_of_a_file_that_was_never_loaded_are_read_from_it(write):
    register_coco_instances("plain_registration", {}, write(), "")
    assert MetadataCatalog.get("plain_registration").get("thing_classes") is None
    assert class_names("plain_registration") == ["red", "white"]
    opts = ["DATASETS.TRAIN", ("plain_registration",), "DATASETS.TEST", ()]
    assert load_cfg(QUICK, opts).MODEL.SparseRCNN.NUM_CLASSES == 2


def test_num_classes_zero_without_known_data_asks_for_the_number():
    cfg = read_cfg(QUICK, ["DATASETS.TRAIN", (), "DATASETS.TEST", ()])
    resolve_num_classes(cfg)
    with pytest.raises(ConfigError, match="write the number of classes"):
        check_config(cfg)


# Names of data sets


def test_an_unregistered_data_set_suggests_close_names():
    cfg = read_cfg(QUICK, ["DATASETS.TRAIN", ("shape_train",)])
    for build in (build_train_loader, lambda c: build_test_loader(c, "shape_train")):
        with pytest.raises(DataError) as caught:
            build(cfg)
        assert "'shape_train' is not registered" in str(caught.value)
        assert "Did you mean shapes_train" in str(caught.value)


def test_a_name_unlike_any_other_suggests_nothing():
    with pytest.raises(DataError) as caught:
        build_test_loader(read_cfg(QUICK), "qqqqqqqq")
    assert "Did you mean" not in str(caught.value)
    assert "DATASETS.CUSTOM" in str(caught.value)


def test_an_empty_training_set_asks_for_a_name():
    cfg = read_cfg(QUICK, ["DATASETS.TRAIN", ()])
    with pytest.raises(DataError, match=r"DATASETS\.TRAIN is empty\. Write a registered name"):
        build_train_loader(cfg)
