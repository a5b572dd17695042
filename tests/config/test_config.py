"""Official defaults, official files, and errors that say what to write."""

import json
import logging
from pathlib import Path

import pytest
import torch
import yaml
from conftest import tiny_cfg
from detectron2.config import CfgNode, get_cfg

from dsrcnn import add_dsrcnn_config, load_cfg
from dsrcnn.config import check_config, choose_device, read_cfg, shipped_configs
from dsrcnn.config.read import find_config
from dsrcnn.data.datasets import class_names
from dsrcnn.errors import ConfigError

# Sparse R-CNN's own keys and defaults, as its config.py sets them.
SPARSE_RCNN = {
    "NUM_CLASSES": 80,
    "NUM_PROPOSALS": 300,
    "NHEADS": 8,
    "DROPOUT": 0.0,
    "DIM_FEEDFORWARD": 2048,
    "ACTIVATION": "relu",
    "HIDDEN_DIM": 256,
    "NUM_CLS": 1,
    "NUM_REG": 3,
    "NUM_HEADS": 6,
    "NUM_DYNAMIC": 2,
    "DIM_DYNAMIC": 64,
    "CLASS_WEIGHT": 2.0,
    "GIOU_WEIGHT": 2.0,
    "L1_WEIGHT": 5.0,
    "DEEP_SUPERVISION": True,
    "NO_OBJECT_WEIGHT": 0.1,
    "USE_FOCAL": True,
    "ALPHA": 0.25,
    "GAMMA": 2.0,
    "PRIOR_PROB": 0.01,
}
OTHER_DEFAULTS = {
    "SOLVER.OPTIMIZER": "ADAMW",
    "SOLVER.BACKBONE_MULTIPLIER": 1.0,
    "TEST.AUG.ENABLED": False,
    "TEST.AUG.MIN_SIZES": (400, 500, 600, 640, 700, 900, 1000, 1100, 1200, 1300, 1400, 1800, 800),
    "TEST.AUG.MAX_SIZE": 4000,
    "TEST.AUG.FLIP": True,
    "TEST.AUG.CVPODS_TTA": True,
    "TEST.AUG.SCALE_FILTER": True,
    "TEST.AUG.SCALE_RANGES": (
        *([96, 10000], [96, 10000]),
        *([64, 10000], [64, 10000], [64, 10000]),
        *([0, 10000], [0, 10000]),
        *([0, 256], [0, 256]),
        *([0, 192], [0, 192]),
        *([0, 96], [0, 10000]),
    ),
}
# What the official base file sets.
BASE = {
    "MODEL.META_ARCHITECTURE": "SparseRCNN",
    "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3", "p4", "p5"],
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIAlignV2",
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 7,
    "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": 2,
    "SOLVER.OPTIMIZER": "ADAMW",
    "SOLVER.BACKBONE_MULTIPLIER": 1.0,
    "SOLVER.IMS_PER_BATCH": 16,
    "SOLVER.BASE_LR": 2.5e-5,
    "SOLVER.WEIGHT_DECAY": 1e-4,
    "SOLVER.LR_SCHEDULER_NAME": "WarmupMultiStepLR",
    "SOLVER.STEPS": (210000, 250000),
    "SOLVER.MAX_ITER": 270000,
    "SOLVER.GAMMA": 0.1,
    "SOLVER.WARMUP_FACTOR": 0.01,
    "SOLVER.WARMUP_ITERS": 1000,
    "SOLVER.WARMUP_METHOD": "linear",
    "SOLVER.CLIP_GRADIENTS.ENABLED": True,
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "full_model",
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": 1.0,
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": 2.0,
    "SEED": 40244023,
    "INPUT.MIN_SIZE_TRAIN": (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": "choice",
    "INPUT.MAX_SIZE_TRAIN": 1333,
    "INPUT.MIN_SIZE_TEST": 800,
    "INPUT.MAX_SIZE_TEST": 1333,
    "INPUT.CROP.ENABLED": False,
    "INPUT.CROP.TYPE": "absolute_range",
    "INPUT.CROP.SIZE": [384, 600],
    "INPUT.FORMAT": "RGB",
    "DATALOADER.FILTER_EMPTY_ANNOTATIONS": False,
    "DATALOADER.NUM_WORKERS": 4,
    "TEST.EVAL_PERIOD": 7330,
    "DATASETS.TRAIN": ("coco_2017_train",),
    "DATASETS.TEST": ("coco_2017_val",),
}

OFFICIAL_BASE = """
MODEL:
  META_ARCHITECTURE: "SparseRCNN"
  WEIGHTS: "detectron2://ImageNetPretrained/torchvision/R-50.pkl"
  PIXEL_MEAN: [123.675, 116.280, 103.530]
  PIXEL_STD: [58.395, 57.120, 57.375]
  BACKBONE:
    NAME: "build_resnet_fpn_backbone"
  RESNETS:
    OUT_FEATURES: ["res2", "res3", "res4", "res5"]
  FPN:
    IN_FEATURES: ["res2", "res3", "res4", "res5"]
  ROI_HEADS:
    IN_FEATURES: ["p2", "p3", "p4", "p5"]
  ROI_BOX_HEAD:
    POOLER_TYPE: "ROIAlignV2"
    POOLER_RESOLUTION: 7
    POOLER_SAMPLING_RATIO: 2
  SparseRCNN:
{keys}
DATASETS:
  TRAIN: ("coco_2017_train",)
  TEST: ("coco_2017_val",)
SOLVER:
  IMS_PER_BATCH: 16
  BASE_LR: 0.000025
  STEPS: (210000, 250000)
  MAX_ITER: 270000
  WARMUP_FACTOR: 0.01
  WARMUP_ITERS: 1000
  WEIGHT_DECAY: 0.0001
  OPTIMIZER: "ADAMW"
  BACKBONE_MULTIPLIER: 1.0  # keep same with BASE_LR.
  CLIP_GRADIENTS:
    ENABLED: True
    CLIP_TYPE: "full_model"
    CLIP_VALUE: 1.0
    NORM_TYPE: 2.0
SEED: 40244023
INPUT:
  MIN_SIZE_TRAIN: (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
  CROP:
    ENABLED: False
    TYPE: "absolute_range"
    SIZE: (384, 600)
  FORMAT: "RGB"
TEST:
  EVAL_PERIOD: 7330
  AUG:
    CVPODS_TTA: True
    SCALE_FILTER: True
    SCALE_RANGES: ([96, 10000], [96, 10000])
DATALOADER:
  FILTER_EMPTY_ANNOTATIONS: False
  NUM_WORKERS: 4
VERSION: 2
"""
OFFICIAL_LEAF = """
_BASE_: "Base-SparseRCNN.yaml"
MODEL:
  WEIGHTS: "detectron2://ImageNetPretrained/torchvision/R-50.pkl"
  RESNETS:
    DEPTH: 50
    STRIDE_IN_1X1: False
  SparseRCNN:
    NUM_PROPOSALS: 300
    NUM_CLASSES: 80
DATASETS:
  TRAIN: ("coco_2017_train",)
  TEST:  ("coco_2017_val",)
SOLVER:
  STEPS: (210000, 250000)
  MAX_ITER: 270000
INPUT:
  CROP:
    ENABLED: True
  FORMAT: "RGB"
"""


@pytest.fixture
def write(tmp_path):
    def write(text, name="mine.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


@pytest.fixture
def messages(caplog, monkeypatch):
    """What this package logged; set up loggers no longer propagate, so ours is made to."""
    monkeypatch.setattr(logging.getLogger("dsrcnn"), "propagate", True)
    return lambda: [r.getMessage() for r in caplog.records if r.name.startswith("dsrcnn")]


def value_of(cfg, key):
    for name in key.split("."):
        cfg = cfg[name]
    return list(cfg) if isinstance(cfg, tuple) else cfg


def agree(cfg, table):
    expected = {k: list(v) if isinstance(v, tuple) else v for k, v in table.items()}
    assert {key: value_of(cfg, key) for key in table} == expected


# Defaults and official files


def test_the_official_keys_have_their_official_defaults():
    cfg = add_dsrcnn_config(get_cfg())
    node = cfg.MODEL.SparseRCNN
    agree(node, SPARSE_RCNN)
    agree(cfg, OTHER_DEFAULTS)
    types = {key: type(node[key]) for key in SPARSE_RCNN}
    assert types == {key: type(value) for key, value in SPARSE_RCNN.items()}


def test_keys_of_our_own_are_nodes_beside_the_official_ones():
    node = add_dsrcnn_config(get_cfg()).MODEL.SparseRCNN
    own = {key: value for key, value in node.items() if key not in SPARSE_RCNN}
    assert all(isinstance(value, CfgNode) for value in own.values()), sorted(own)


def test_every_scale_of_the_test_augmentation_has_its_range():
    node = add_dsrcnn_config(get_cfg()).TEST.AUG
    assert len(node.SCALE_RANGES) == len(node.MIN_SIZES) == 13


def test_detectron2s_own_defaults_are_not_shadowed():
    plain, ours = get_cfg(), add_dsrcnn_config(get_cfg())

    def compare(before, after, path):
        for key, value in before.items():
            if isinstance(value, CfgNode):
                compare(value, after[key], f"{path}{key}.")
            elif f"{path}{key}" not in OTHER_DEFAULTS:
                assert after[key] == value, f"{path}{key}"

    compare(plain, ours, "")


def test_the_base_file_is_the_official_recipe():
    agree(read_cfg("Base-SparseRCNN"), BASE)
    agree(read_cfg("Base-SparseRCNN").MODEL.SparseRCNN, SPARSE_RCNN)


@pytest.mark.parametrize(
    ("name", "depth", "proposals", "crop"),
    [
        ("sparse_rcnn_R50_100pro_3x", 50, 100, False),
        ("sparse_rcnn_R50_300pro_3x", 50, 300, True),
        ("sparse_rcnn_R101_100pro_3x", 101, 100, False),
        ("sparse_rcnn_R101_300pro_3x", 101, 300, True),
    ],
)
def test_the_released_configs_differ_from_the_base_as_published(name, depth, proposals, crop):
    cfg = read_cfg(f"coco/{name}")
    leaf = {
        "MODEL.RESNETS.DEPTH": depth,
        "MODEL.SparseRCNN.NUM_PROPOSALS": proposals,
        "INPUT.CROP.ENABLED": crop,
    }
    agree(cfg, {**BASE, **leaf})


def test_an_official_file_with_its_base_is_read_unchanged(write):
    keys = "\n".join(f"    {key}: {value!r}" for key, value in SPARSE_RCNN.items())
    write(OFFICIAL_BASE.format(keys=keys), "Base-SparseRCNN.yaml")
    cfg = load_cfg(write(OFFICIAL_LEAF, "sparsercnn.res50.300pro.3x.yaml"))
    agree(cfg, {**BASE, "INPUT.CROP.ENABLED": True})
    agree(cfg.MODEL.SparseRCNN, SPARSE_RCNN)
    # Ours is the same recipe; it spells out a few defaults of Detectron2.
    ours = load_cfg("coco/sparse_rcnn_R50_300pro_3x")
    for node in ("MODEL", "SOLVER", "INPUT", "DATASETS", "DATALOADER"):
        assert cfg[node] == ours[node], node


def test_a_file_without_a_version_keeps_our_keys(write):
    path = write("MODEL:\n  SparseRCNN:\n    NUM_PROPOSALS: 3\n")
    cfg = read_cfg(path)
    agree(cfg.MODEL.SparseRCNN, {**SPARSE_RCNN, "NUM_PROPOSALS": 3})


def test_a_dumped_config_reads_back_the_same(write):
    cfg = load_cfg("quick/sparse_rcnn_shapes")
    assert json.dumps(load_cfg(write(cfg.dump()))) == json.dumps(cfg)  # tuples as lists


# Reading


def test_overrides_come_last(write):
    path = write("MODEL:\n  SparseRCNN:\n    NUM_HEADS: 3\n    NUM_REG: 2\nVERSION: 2\n")
    cfg = read_cfg(path, ["MODEL.SparseRCNN.NUM_HEADS", "4", "SOLVER.BASE_LR", "1e-3"])
    node = cfg.MODEL.SparseRCNN
    assert (node.NUM_HEADS, node.NUM_REG, cfg.SOLVER.BASE_LR) == (4, 2, 0.001)


def test_reading_twice_gives_independent_configs():
    first = read_cfg("quick/sparse_rcnn_shapes")
    first.MODEL.SparseRCNN.NUM_HEADS = 99
    assert read_cfg("quick/sparse_rcnn_shapes").MODEL.SparseRCNN.NUM_HEADS != 99


def test_a_file_is_found_by_path_and_by_shipped_name(write, monkeypatch, tmp_path):
    path = write("VERSION: 2\n")
    assert find_config(path) == find_config(str(path)) == path
    monkeypatch.chdir(tmp_path)  # shipped names work from any folder
    for name in ("coco/sparse_rcnn_R50_100pro_3x", "configs/coco/sparse_rcnn_R50_100pro_3x"):
        assert find_config(name).name == "sparse_rcnn_R50_100pro_3x.yaml"


@pytest.mark.parametrize("in_file", [True, False], ids=["file", "override"])
@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("MODEL.SparseRCNN.NUM_PROPOSAL", "MODEL.SparseRCNN.NUM_PROPOSALS"),
        ("SOLVER.BASELR", "SOLVER.BASE_LR"),
    ],
)
def test_an_unknown_key_suggests_the_one_meant(write, in_file, key, meant):
    content = {"VERSION": 2}
    if in_file:
        nested = content
        *parents, leaf = key.split(".")
        for parent in parents:
            nested = nested.setdefault(parent, {})
        nested[leaf] = 5
    path = write(yaml.safe_dump(content))
    with pytest.raises(ConfigError) as caught:
        read_cfg(path, [] if in_file else [key, 5])
    assert f"Unknown config key {key!r}" in str(caught.value)
    assert f"Did you mean {meant}" in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("opts", "unknown"),
    [
        (["SOLVR.BASE_LR", 1.0], "SOLVR.BASE_LR"),
        (["SOLVER.BASE_LR.X", 1.0], "SOLVER.BASE_LR.X"),  # below what is a number
        (["SOLVER.GAMMA", 0.5, "SOLVER.BASE_LR.X", 1.0], "SOLVER.BASE_LR.X"),
    ],
)
def test_an_unknown_parent_is_an_unknown_key(write, opts, unknown):
    with pytest.raises(ConfigError, match=f"Unknown config key '{unknown}'"):
        read_cfg(write("VERSION: 2\n"), opts)


@pytest.mark.parametrize(
    ("name", "close"),
    [
        ("coco/sparse_rcnn_R50_300pro", "coco/sparse_rcnn_R50_300pro_3x"),
        ("configs/coco/sparse_rcnn_R50_300pro_5x.yaml", "coco/sparse_rcnn_R50_300pro_3x"),
        ("sparse_rcnn_shapes", "quick/sparse_rcnn_shapes"),
        ("zzzz", "Base-SparseRCNN"),  # nothing is close: all are listed
    ],
)
def test_a_missing_file_lists_close_names(name, close):
    with pytest.raises(ConfigError) as caught:
        read_cfg(name)
    assert f"{name!r} does not exist" in str(caught.value)
    assert close in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.SparseRCNN.NUM_PROPOSALS", "many"),
        ("SOLVER.BASE_LR", "fast"),
        ("DATASETS.TRAIN", "shapes_train"),  # a name where a tuple belongs
        ("MODEL.SparseRCNN", 3),
    ],
)
def test_a_value_of_another_type_names_its_key(write, key, value):
    with pytest.raises(ConfigError) as caught:
        read_cfg(write("VERSION: 2\n"), [key, value])
    assert key in str(caught.value)
    assert str(value) in str(caught.value)


@pytest.mark.parametrize("opts", [["MODEL.DEVICE"], ["MODEL.DEVICE", "cpu", "SEED"]])
def test_overrides_that_are_no_pairs_are_shown(opts):
    with pytest.raises(ConfigError) as caught:
        read_cfg("quick/sparse_rcnn_shapes", opts)
    assert f"there are {len(opts)} words: {' '.join(opts)}" in str(caught.value)


def test_a_missing_base_is_named(write):
    path = write("_BASE_: nowhere.yaml\n")
    with pytest.raises(ConfigError) as caught:
        read_cfg(path)
    assert str(path) in str(caught.value)
    assert str(path.parent / "nowhere.yaml") in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("MODEL: {DEVICE: [", "not valid YAML"),
        ("", "lines KEY: VALUE"),
        ("- VERSION\n", "lines KEY: VALUE"),
        ("VERSION: 3\n", "v3 config"),
        ("VERSION: 2\nINPUT:\n  FORMAT: 2022-05-02\n", "INPUT.FORMAT"),
    ],
)
def test_a_file_that_is_no_config_is_named(write, text, expected):
    path = write(text)
    with pytest.raises(ConfigError) as caught:
        read_cfg(path)
    assert expected in str(caught.value)
    assert str(path) in str(caught.value)


# Checks

NODE = "MODEL.SparseRCNN"


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        (f"{NODE}.HIDDEN_DIM", 64, ["MODEL.FPN.OUT_CHANNELS is 32", f"{NODE}.HIDDEN_DIM is 64"]),
        ("MODEL.FPN.OUT_CHANNELS", 256, ["MODEL.FPN.OUT_CHANNELS is 256", "HIDDEN_DIM is 32"]),
        (f"{NODE}.NHEADS", 5, [f"{NODE}.HIDDEN_DIM 32", f"multiple of {NODE}.NHEADS 5"]),
        (f"{NODE}.NHEADS", 0, [f"{NODE}.NHEADS is 0", "at least 1"]),
        (f"{NODE}.NUM_DYNAMIC", 3, [f"{NODE}.NUM_DYNAMIC is 3", f"Write {NODE}.NUM_DYNAMIC 2"]),
        (f"{NODE}.NUM_CLASSES", 0, [f"{NODE}.NUM_CLASSES is 0", "write the number of classes"]),
        (f"{NODE}.NUM_PROPOSALS", 0, [f"{NODE}.NUM_PROPOSALS is 0", "at least 1"]),
        (f"{NODE}.NUM_HEADS", 0, [f"{NODE}.NUM_HEADS is 0", "at least 1"]),
        (f"{NODE}.DIM_DYNAMIC", -1, [f"{NODE}.DIM_DYNAMIC is -1", "at least 1"]),
        (f"{NODE}.ACTIVATION", "tanh", [f"{NODE}.ACTIVATION is 'tanh'", "relu, gelu"]),
        (f"{NODE}.DLA.MIN_UNITS", 2, ["DLA.MIN_UNITS is 2", "0 or 1"]),
        (f"{NODE}.DLA.DECISION", "max", [f"{NODE}.DLA.DECISION is 'max'", "rescale, topk, exact"]),
        (f"{NODE}.DLA.ROUNDING", "ceil", ["'ceil'", "floor, round"]),
        (f"{NODE}.DLA.ORDER", "", ["DLA.ORDER is ''", "step_then_cap, cap_then_step"]),
        (f"{NODE}.DLA.NORMALIZER", "fg", ["'fg'", "positives, gt"]),
        (f"{NODE}.DLA.TOP_Q", 0, ["DLA.TOP_Q is 0", "at least 1"]),
        (f"{NODE}.DLA.ITERATIONS", 0, ["DLA.ITERATIONS is 0", "at least 1"]),
        (f"{NODE}.DLA.STATIC_UNITS", -1, ["DLA.STATIC_UNITS is -1", "at least 0"]),
        (f"{NODE}.DLA.UNIT_STEP", -0.5, ["DLA.UNIT_STEP is -0.5", "at least 0"]),
        (f"{NODE}.DLA.REPAIR", -1, ["DLA.REPAIR is -1", "0 for none"]),
        (f"{NODE}.DLA.EPSILON", 0.0, ["DLA.EPSILON is 0.0", "above 0"]),
        (f"{NODE}.DLA.MAX_POSITIVE_FRACTION", 1.5, ["FRACTION is 1.5", "at most 1"]),
        (f"{NODE}.PROPOSALS.BOXES", "corner", ["'corner'", "image, center, grid, random"]),
        (f"{NODE}.DPG.REDUCE", "max", ["DPG.REDUCE is 'max'", "sum, mean"]),
        (f"{NODE}.DPG.NORM", "LN", ["DPG.NORM is 'LN'", "BN, SyncBN, FrozenBN, GN"]),
        (f"{NODE}.DPG.NUM_EXPERTS", 0, ["DPG.NUM_EXPERTS is 0", "at least 1"]),
        (f"{NODE}.OVERLAP.LOSS", "l1", ["OVERLAP.LOSS is 'l1'", "giou, diou, ciou"]),
        (f"{NODE}.OVERLAP.COST", "l1", ["OVERLAP.COST is 'l1'", "giou, diou, ciou"]),
        (f"{NODE}.DPG.TAU_END", 0.0, ["DPG.TAU_END is 0.0", "above 0"]),
        (f"{NODE}.DPG.TAU_ITERS", -1, ["DPG.TAU_ITERS is -1", "write 0"]),
        (f"{NODE}.NMS.ENABLED", "yes", ["NMS.ENABLED is 'yes'", "True, False, or None"]),
        (f"{NODE}.NMS.THRESHOLD", 7.0, ["NMS.THRESHOLD is 7.0", "between 0 and 1"]),
        ("SOLVER.OPTIMIZER", "ADAM", ["SOLVER.OPTIMIZER is 'ADAM'", "ADAMW, SGD"]),
        (
            "SOLVER.CLIP_GRADIENTS.CLIP_TYPE",
            "model",
            ["CLIP_TYPE is 'model'", "full_model, norm, value"],
        ),
    ],
)
def test_a_value_that_cannot_work_is_refused_with_what_to_write(key, value, expected):
    cfg = tiny_cfg(key, value)
    with pytest.raises(ConfigError) as caught:
        check_config(cfg)
    for part in expected:
        assert part in str(caught.value)


@pytest.mark.parametrize("clip", ["full_model", "norm", "value"])
@pytest.mark.parametrize("optimizer", ["ADAMW", "SGD"])
def test_values_that_work_are_accepted(clip, optimizer):
    check_config(tiny_cfg("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", clip, "SOLVER.OPTIMIZER", optimizer))


def test_other_architectures_are_not_measured_by_sparse_rcnns_rules():
    cfg = tiny_cfg("MODEL.META_ARCHITECTURE", "GeneralizedRCNN", f"{NODE}.NUM_PROPOSALS", 0)
    check_config(cfg)


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cuda_without_a_gpu_becomes_the_cpu_with_a_note(monkeypatch, messages, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cfg = load_cfg("quick/sparse_rcnn_shapes", ["MODEL.DEVICE", device])
    assert cfg.MODEL.DEVICE == "cpu"
    (note,) = messages()
    assert f"MODEL.DEVICE is {device!r}" in note
    assert "running on the CPU" in note


@pytest.mark.parametrize(("gpu", "device"), [(True, "cuda"), (True, "cpu"), (False, "cpu")])
def test_a_device_that_is_there_is_kept_without_a_note(monkeypatch, messages, gpu, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    cfg = read_cfg("quick/sparse_rcnn_shapes", ["MODEL.DEVICE", device])
    choose_device(cfg)
    assert device == cfg.MODEL.DEVICE
    assert messages() == []


# Shipped files


def data_at_hand(cfg):
    custom = cfg.DATASETS.CUSTOM
    if custom.NAME:
        files = [f for f in (custom.TRAIN_JSON, custom.TEST_JSON) if f]
        return bool(files) and all(Path(f).is_file() for f in files)
    names = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
    return bool(names) and all(class_names(name) is not None for name in names)


@pytest.mark.parametrize("name", shipped_configs())
def test_every_shipped_config_passes_its_checks(name):
    cfg = read_cfg(name)
    for node in (cfg.MODEL.SparseRCNN, cfg.MODEL.ROI_HEADS):
        node.NUM_CLASSES = node.NUM_CLASSES or 7  # from the data, here of whichever kind
    check_config(cfg)


@pytest.mark.parametrize("name", shipped_configs())
def test_every_shipped_config_loads_where_its_data_are_at_hand(name):
    if not data_at_hand(read_cfg(name)):
        pytest.skip("its data are not on this machine")
    cfg = load_cfg(name)
    is_faster = cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN"
    count = (cfg.MODEL.ROI_HEADS if is_faster else cfg.MODEL.SparseRCNN).NUM_CLASSES
    assert count > 0
    for split in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        assert len(class_names(split)) == count


def test_no_two_shipped_configs_write_to_the_same_folder():
    folders = [read_cfg(name).OUTPUT_DIR for name in shipped_configs()]
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("value", ["0", 0, "-2", "1"])
def test_a_whole_number_is_accepted_where_a_fraction_is_expected(value):
    cfg = tiny_cfg(f"{NODE}.DLA.UNIT_STEP", value)
    assert float(value) == cfg.MODEL.SparseRCNN.DLA.UNIT_STEP
    assert isinstance(cfg.MODEL.SparseRCNN.DLA.UNIT_STEP, float)


def test_a_whole_number_for_a_fraction_in_a_file_says_what_to_write(write):
    with pytest.raises(ConfigError, match="Write the number with a decimal point"):
        read_cfg(write("MODEL:\n  SparseRCNN:\n    DLA: {UNIT_STEP: 0}\n"))
