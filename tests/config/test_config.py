"""Defaults and files of the official Sparse R-CNN."""

import json

import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog

from dsrcnn import add_dsrcnn_config, load_cfg
from dsrcnn.config import read_cfg

# Sparse R-CNN's own keys and defaults, as its config.py sets them.
SPARSE_RCNN = {
    "NUM_CLASSES": 80, "NUM_PROPOSALS": 300, "NHEADS": 8, "DROPOUT": 0.0, "DIM_FEEDFORWARD": 2048,
    "ACTIVATION": "relu", "HIDDEN_DIM": 256, "NUM_CLS": 1, "NUM_REG": 3, "NUM_HEADS": 6,
    "NUM_DYNAMIC": 2, "DIM_DYNAMIC": 64, "CLASS_WEIGHT": 2.0, "GIOU_WEIGHT": 2.0,
    "L1_WEIGHT": 5.0, "DEEP_SUPERVISION": True, "NO_OBJECT_WEIGHT": 0.1, "USE_FOCAL": True,
    "ALPHA": 0.25, "GAMMA": 2.0, "PRIOR_PROB": 0.01,
}  # fmt: skip
OTHER_DEFAULTS = {
    "SOLVER.OPTIMIZER": "ADAMW", "SOLVER.BACKBONE_MULTIPLIER": 1.0,
    "TEST.AUG.ENABLED": False, "TEST.AUG.FLIP": True, "TEST.AUG.CVPODS_TTA": True,
    "TEST.AUG.MIN_SIZES": (400, 500, 600, 640, 700, 900, 1000, 1100, 1200, 1300, 1400, 1800, 800),
    "TEST.AUG.MAX_SIZE": 4000, "TEST.AUG.SCALE_FILTER": True,
    "TEST.AUG.SCALE_RANGES": (
        *([96, 10000],) * 2, *([64, 10000],) * 3, *([0, 10000],) * 2,
        *([0, 256],) * 2, *([0, 192],) * 2, [0, 96], [0, 10000],
    ),
}  # fmt: skip
OFFICIAL_BASE = """
MODEL:
  META_ARCHITECTURE: "SparseRCNN"
  WEIGHTS: "detectron2://ImageNetPretrained/torchvision/R-50.pkl"
  PIXEL_MEAN: [123.675, 116.280, 103.530]
  PIXEL_STD: [58.395, 57.120, 57.375]
  BACKBONE: {{NAME: "build_resnet_fpn_backbone"}}
  RESNETS: {{OUT_FEATURES: ["res2", "res3", "res4", "res5"]}}
  FPN: {{IN_FEATURES: ["res2", "res3", "res4", "res5"]}}
  ROI_HEADS: {{IN_FEATURES: ["p2", "p3", "p4", "p5"]}}
  ROI_BOX_HEAD: {{POOLER_TYPE: "ROIAlignV2", POOLER_RESOLUTION: 7, POOLER_SAMPLING_RATIO: 2}}
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
  CLIP_GRADIENTS: {{ENABLED: True, CLIP_TYPE: "full_model", CLIP_VALUE: 1.0, NORM_TYPE: 2.0}}
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
DATALOADER: {{FILTER_EMPTY_ANNOTATIONS: False, NUM_WORKERS: 4}}
VERSION: 2
"""
OFFICIAL_LEAF = """
_BASE_: "Base-SparseRCNN.yaml"
MODEL:
  WEIGHTS: "detectron2://ImageNetPretrained/torchvision/R-50.pkl"
  RESNETS: {{DEPTH: {depth}, STRIDE_IN_1X1: False}}
  SparseRCNN: {{NUM_PROPOSALS: {proposals}, NUM_CLASSES: 80}}
DATASETS:
  TRAIN: ("coco_2017_train",)
  TEST:  ("coco_2017_val",)
SOLVER:
  STEPS: (210000, 250000)
  MAX_ITER: 270000
INPUT:
  CROP: {{ENABLED: {crop}}}
  FORMAT: "RGB"
"""


def value_of(cfg, key):
    for name in key.split("."):
        cfg = cfg[name]
    return list(cfg) if isinstance(cfg, tuple) else cfg


def agree(cfg, table):
    expected = {k: list(v) if isinstance(v, tuple) else v for k, v in table.items()}
    assert {key: value_of(cfg, key) for key in table} == expected


def test_the_official_keys_have_their_official_defaults():
    cfg = add_dsrcnn_config(get_cfg())
    node = cfg.MODEL.SparseRCNN
    agree(node, SPARSE_RCNN)
    agree(cfg, OTHER_DEFAULTS)
    types = {key: type(node[key]) for key in SPARSE_RCNN}
    assert types == {key: type(value) for key, value in SPARSE_RCNN.items()}


def test_defaults_of_detectron2_are_unchanged():
    plain, ours = get_cfg(), add_dsrcnn_config(get_cfg())

    def compare(before, after, path):
        for key, value in before.items():
            if isinstance(value, CfgNode):
                compare(value, after[key], f"{path}{key}.")
            elif f"{path}{key}" not in OTHER_DEFAULTS:
                assert after[key] == value, f"{path}{key}"

    compare(plain, ours, "")


@pytest.fixture
def official(write):
    """A function that reads an official file with its base."""

    def read(depth=50, proposals=300, crop=True):
        keys = "\n".join(f"    {key}: {value!r}" for key, value in SPARSE_RCNN.items())
        write(OFFICIAL_BASE.format(keys=keys), "Base-SparseRCNN.yaml")
        text = OFFICIAL_LEAF.format(depth=depth, proposals=proposals, crop=crop)
        return load_cfg(write(text, "sparsercnn.yaml"))

    return read


@pytest.mark.parametrize(("name", "leaf"), [
    ("sparse_rcnn_R50_100pro_3x", (50, 100, False)),
    ("sparse_rcnn_R50_300pro_3x", (50, 300, True)),
    ("sparse_rcnn_R101_100pro_3x", (101, 100, False)),
    ("sparse_rcnn_R101_300pro_3x", (101, 300, True)),
])  # fmt: skip
def test_shipped_configs_equal_the_official_files(official, name, leaf):
    cfg = official(*leaf)
    # Weights of R-101 are files of the user, since the official ones must be converted.
    ours = load_cfg(f"coco/{name}", ["MODEL.WEIGHTS", cfg.MODEL.WEIGHTS])
    for node in ("MODEL", "SOLVER", "INPUT", "DATASETS", "DATALOADER", "SEED"):
        assert cfg[node] == ours[node], node
    assert ours.TEST.EVAL_PERIOD == 7330


OFFICIAL_CROWDHUMAN = """
_BASE_: "Base-SparseRCNN.yaml"
MODEL:
  WEIGHTS: "detectron2://ImageNetPretrained/torchvision/R-50.pkl"
  RESNETS: {DEPTH: 50, STRIDE_IN_1X1: False}
  SparseRCNN: {NUM_PROPOSALS: 500, NUM_CLASSES: 1}
DATASETS:
  TRAIN: ("CrowdHuman_train",)
  TEST: ("CrowdHuman_val",)
SOLVER:
  STEPS: (37500,)
  MAX_ITER: 46875
INPUT:
  MIN_SIZE_TRAIN: (640, 672, 704, 736, 768, 800)
  MAX_SIZE_TRAIN: 1500
  MAX_SIZE_TRAIN: 1500
  FORMAT: "RGB"
"""


def test_the_official_file_of_crowdhuman_loads_with_its_names_and_its_repeated_line(
    official, write, caplog
):
    official()  # writes the base
    with caplog.at_level("WARNING"):
        cfg = load_cfg(write(OFFICIAL_CROWDHUMAN, "sparsercnn.crowdhuman.yaml"))
    assert "the key MAX_SIZE_TRAIN stands on line 15 and again on line 16" in caplog.text
    assert (cfg.INPUT.MAX_SIZE_TRAIN, cfg.SOLVER.MAX_ITER) == (1500, 46875)
    names = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
    assert names == ("CrowdHuman_train", "CrowdHuman_val")
    for name in names:
        official_one, ours = (MetadataCatalog.get(n) for n in (name, name.lower()))
        for field in ("json_file", "image_root", "evaluator_type", "thing_classes"):
            assert getattr(official_one, field) == getattr(ours, field)


def test_a_file_without_a_version_may_have_our_keys(write):
    cfg = read_cfg(write("MODEL: {SparseRCNN: {NUM_PROPOSALS: 3}}\n"))
    agree(cfg.MODEL.SparseRCNN, {**SPARSE_RCNN, "NUM_PROPOSALS": 3})


def test_a_dumped_config_reads_back_the_same(write):
    cfg = load_cfg("quick/sparse_rcnn_shapes")
    assert json.dumps(load_cfg(write(cfg.dump()))) == json.dumps(cfg)  # tuples as lists
