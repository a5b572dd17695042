"""Your own data from the config alone, and the number of classes of the model."""

import json
import os

import pytest
from conftest import tiny_cfg, write_coco
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.modeling import META_ARCH_REGISTRY

from dsrcnn import load_cfg
from dsrcnn.config import check_config, read_cfg
from dsrcnn.data import build_test_loader, build_train_loader, use_custom_data
from dsrcnn.data.datasets import class_names, resolve_num_classes
from dsrcnn.errors import ConfigError, DataError
from dsrcnn.modeling import SparseRCNN

QUICK = "quick/sparse_rcnn_shapes"  # its NUM_CLASSES is 0
NUM_CLASSES = "MODEL.SparseRCNN.NUM_CLASSES"


@pytest.fixture
def write(tmp_path):
    """Writes a COCO file of the given classes; returns its path."""

    def write(name="cells.json", classes=("red", "white")):
        path = tmp_path / name
        write_coco(path, tmp_path)
        categories = [{"id": 1 + i, "name": c} for i, c in enumerate(classes)]
        path.write_text(json.dumps({**json.loads(path.read_text()), "categories": categories}))
        return str(path)

    return write


def custom(train="", test="", name="toy", images=""):
    """Overrides that set DATASETS.CUSTOM."""
    keys = {"NAME": name, "TRAIN_JSON": train, "TEST_JSON": test}
    keys |= {"TRAIN_IMAGES": images, "TEST_IMAGES": images}
    return [word for key, value in keys.items() for word in (f"DATASETS.CUSTOM.{key}", value)]


def test_both_files_become_the_data_sets_of_the_config(write, tmp_path):
    opts = custom(write("a.json"), write("b.json"), name="cells", images=str(tmp_path))
    cfg = load_cfg(QUICK, opts)
    assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == (("cells_train",), ("cells_test",))
    assert cfg.DATASETS.CUSTOM.CLASSES == ("red", "white")
    assert MetadataCatalog.get("cells_test").thing_classes == ["red", "white"]
    assert DatasetCatalog.get("cells_train")[0]["file_name"] == str(tmp_path / "1.jpg")
    assert cfg.MODEL.SparseRCNN.NUM_CLASSES == 2
    assert load_cfg(QUICK, opts).dump() == cfg.dump()  # can be loaded twice


def test_a_later_config_does_not_change_the_data_of_an_earlier_one(write, tmp_path):
    files = []
    for place in ("a", "b"):  # folders of the same name
        (tmp_path / place / "cells/annotations").mkdir(parents=True)
        for split in ("train", "val"):
            images = tmp_path / place / "cells/images" / split
            write_coco(tmp_path / place / f"cells/annotations/instances_{split}.json", images)
    folder = [("DATASETS.CUSTOM.FOLDER", str(tmp_path / place / "cells")) for place in "ab"]
    turned = ("DATASETS.CUSTOM.TRAIN_SPLIT", "val", "DATASETS.CUSTOM.TEST_SPLIT", "train")
    cfgs = [load_cfg(QUICK, opts) for opts in (folder[0], folder[1], (*folder[0], *turned))]
    for cfg in cfgs:
        records = (
            DatasetCatalog.get(cfg.DATASETS.TRAIN[0]),
            DatasetCatalog.get(cfg.DATASETS.TEST[0]),
        )
        files.append([os.path.dirname(r[0]["file_name"]) for r in records])
    images = [[str(tmp_path / p / "cells/images" / s) for s in ("train", "val")] for p in "ab"]
    assert files == [images[0], images[1], images[0][::-1]]
    assert [cfg.DATASETS.CUSTOM.NAME for cfg in cfgs] == ["cells", "cells_2", "cells_3"]
    assert load_cfg(QUICK, folder[1]).DATASETS.TRAIN == ("cells_2_train",)  # known, so not anew
    first = load_cfg(QUICK, custom(write("a.json"), name="toy"))
    second = load_cfg(QUICK, custom(write("b.json"), name="toy"))
    assert (first.DATASETS.TRAIN, second.DATASETS.TRAIN) == (("toy_train",), ("toy_2_train",))


def test_missing_file_leaves_its_split_empty(write):
    test, train = load_cfg(QUICK, custom(test=write())), load_cfg(QUICK, custom(train=write()))
    assert (test.DATASETS.TRAIN, test.DATASETS.TEST) == ((), ("toy_test",))
    assert (train.DATASETS.TRAIN, train.DATASETS.TEST) == (("toy_train",), ())


def test_config_without_custom_data_is_not_changed():
    cfg = read_cfg(QUICK)
    before = cfg.dump()
    use_custom_data(cfg)
    assert cfg.dump() == before


def test_incomplete_settings_name_what_is_missing(write, tmp_path):
    for opts in (custom(write(), name=""), custom(test=write(), name="")):
        with pytest.raises(ConfigError, match=r"write DATASETS\.CUSTOM\.NAME, for example cells\."):
            load_cfg(QUICK, opts)
    with pytest.raises(ConfigError, match=r"write DATASETS\.CUSTOM\.TRAIN_JSON or TEST_JSON"):
        load_cfg(QUICK, custom())
    with pytest.raises(DataError, match=r"absent\.json' does not exist"):
        load_cfg(QUICK, custom(str(tmp_path / "absent.json")))


@pytest.mark.parametrize("others", [("red", "blue"), ("white", "red"), ("red",)])
def test_message_names_files_with_different_classes(write, others):
    opts = custom(write("a.json"), write("b.json", others))
    with pytest.raises(DataError) as caught:
        load_cfg(QUICK, opts)
    for part in ("a.json", "b.json", "red, white", ", ".join(others)):
        assert part in str(caught.value)


def test_saved_config_knows_its_classes_without_the_files(write, tmp_path):
    saved = tmp_path / "config.yaml"
    opts = custom(write("a.json"), write("b.json"), images=str(tmp_path))
    saved.write_text(load_cfg(QUICK, opts).dump())
    (tmp_path / "a.json").unlink()
    assert len(build_test_loader(load_cfg(saved), "toy_test")) == 2
    write("b.json", ("white", "red"))
    os.utime(tmp_path / "b.json", (2e9, 2e9))  # both were written within one tick of the clock
    with pytest.raises(DataError, match=r"CLASSES and .* name different classes: red, white"):
        load_cfg(saved)
    (tmp_path / "b.json").unlink()
    MetadataCatalog.pop("toy_test")
    DatasetCatalog.remove("toy_test")
    cfg = load_cfg(saved)
    assert MetadataCatalog.get("toy_test").thing_classes == ["red", "white"]
    assert cfg.MODEL.SparseRCNN.NUM_CLASSES == 2
    with pytest.raises(DataError, match=r"b\.json' does not exist"):
        build_test_loader(cfg, "toy_test")


def test_data_with_other_classes_than_the_saved_ones_are_rejected(write):
    opts = custom(test=write(classes=("white", "red")))
    with pytest.raises(DataError, match=r"red, white against white, red.*CLASSES \(\)"):
        load_cfg(QUICK, [*opts, "DATASETS.CUSTOM.CLASSES", ("red", "white")])
    cfg = load_cfg(QUICK, [*opts, "DATASETS.CUSTOM.CLASSES", ()])
    assert cfg.DATASETS.CUSTOM.CLASSES == ("white", "red")


@pytest.mark.parametrize("opts", [[], ["DATASETS.TRAIN", ()], [NUM_CLASSES, 5]])
def test_number_of_classes_is_that_of_the_data(opts):
    cfg = read_cfg(QUICK, opts)
    resolve_num_classes(cfg)
    assert cfg.MODEL.SparseRCNN.NUM_CLASSES == 5


def test_zero_classes_of_faster_rcnn_are_read_from_the_data():
    cfg = read_cfg(QUICK, ["MODEL.META_ARCHITECTURE", "GeneralizedRCNN"])
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 0
    resolve_num_classes(cfg)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 5


def test_message_says_which_number_of_classes_to_write(write):
    with pytest.raises(ConfigError) as caught:
        load_cfg(QUICK, [*custom(write()), NUM_CLASSES, 80])
    for part in ("80", "toy_train", "2 classes (red, white)", f"Write {NUM_CLASSES} 2,", "or 0"):
        assert part in str(caught.value)


def test_data_sets_with_different_classes_are_rejected():
    with pytest.raises(DataError, match="has 5 classes, but 'coco_2017_val' has 80"):
        load_cfg(QUICK, ["DATASETS.TEST", ("coco_2017_val",)])
    DatasetCatalog.register("other", list)
    MetadataCatalog.get("other").thing_classes = ["circle", "box", "triangle", "star", "cross"]
    with pytest.raises(DataError, match="number 1 is 'square' in one and 'box' in the other"):
        load_cfg(QUICK, ["DATASETS.TEST", ("other",)])


def test_overrides_of_custom_data_leave_sets_out_or_are_refused(write):
    opts = custom(write("a.json"), write("b.json"))
    assert load_cfg(QUICK, [*opts, "DATASETS.TEST", ()]).DATASETS.TEST == ()
    cfg = load_cfg(QUICK, [*opts, "DATASETS.TRAIN", ()])
    assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == ((), ("toy_test",))
    assert cfg.MODEL.SparseRCNN.NUM_CLASSES == 2
    assert load_cfg(QUICK, [*opts, "DATASETS.TEST", ("toy_test",)]).DATASETS.TEST == ("toy_test",)
    with pytest.raises(ConfigError, match=r"DATASETS\.TEST is \('shapes_val',\), .*TEST_JSON"):
        load_cfg(QUICK, [*opts, "DATASETS.TEST", ("shapes_val",)])


def test_classes_of_a_file_that_was_never_loaded_are_read_from_it(write):
    register_coco_instances("plain_registration", {}, write(), "")
    assert MetadataCatalog.get("plain_registration").get("thing_classes") is None
    assert class_names("plain_registration") == ["red", "white"]
    opts = ["DATASETS.TRAIN", ("plain_registration",), "DATASETS.TEST", ()]
    assert load_cfg(QUICK, opts).MODEL.SparseRCNN.NUM_CLASSES == 2


def test_zero_classes_without_data_ask_for_the_number():
    cfg = read_cfg(QUICK, ["DATASETS.TRAIN", (), "DATASETS.TEST", ()])
    resolve_num_classes(cfg)
    with pytest.raises(ConfigError, match="write the number of classes"):
        check_config(cfg)


def test_unregistered_data_set_suggests_similar_names():
    cfg = read_cfg(QUICK, ["DATASETS.TRAIN", ("shapes_train", "shape_train")])
    for build in (build_train_loader, lambda c: build_test_loader(c, "shape_train")):
        with pytest.raises(DataError, match=r"'shape_train' is not registered\. Did you mean sh"):
            build(cfg)
    with pytest.raises(DataError, match=r"'qqqqqqqq' is not registered\. For your own dataset"):
        build_test_loader(cfg, "qqqqqqqq")


def test_empty_training_set_asks_for_a_name():
    with pytest.raises(DataError, match=r"DATASETS\.TRAIN is empty\. Write a registered name"):
        build_train_loader(read_cfg(QUICK, ["DATASETS.TRAIN", ()]))


def test_class_names_of_a_tuple_and_of_a_list_are_equal():
    for name, names in (("as_tuple", ("red", "white")), ("as_list", ["red", "white"])):
        DatasetCatalog.register(name, list)
        MetadataCatalog.get(name).thing_classes = names
    cfg = tiny_cfg("MODEL.SparseRCNN.NUM_CLASSES", 0)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("as_tuple",), ("as_list",)
    resolve_num_classes(cfg)
    assert cfg.MODEL.SparseRCNN.NUM_CLASSES == 2


def test_class_count_is_resolved_under_the_key_an_architecture_declares():
    class Counted(SparseRCNN):
        num_classes_key = "MODEL.NUM_CATEGORIES"

    META_ARCH_REGISTRY._do_register("Counted", Counted)
    try:
        cfg = tiny_cfg("MODEL.META_ARCHITECTURE", "Counted")
        cfg.MODEL.NUM_CATEGORIES = 0
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("shapes_train",), ()
        resolve_num_classes(cfg)
    finally:
        META_ARCH_REGISTRY._obj_map.pop("Counted")
    assert cfg.MODEL.NUM_CATEGORIES == 5
