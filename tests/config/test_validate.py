"""Configs that cannot work are refused with the key, the value and what to write."""

import math

import pytest
import torch
from conftest import tiny_cfg
from detectron2.modeling import BACKBONE_REGISTRY, build_model

from dsrcnn import load_cfg
from dsrcnn.config import check_config, choose_device, read_cfg, validate
from dsrcnn.errors import ConfigError

NODE = "MODEL.SparseRCNN"
ASAG = "MODEL.ASAG"
SQR = (f"{NODE}.SQR.ENABLED", True, f"{NODE}.NUM_HEADS", 4)


def asag_cfg(*opts):
    small = ["MODEL.DEVICE", "cpu", f"{NODE}.NUM_CLASSES", 5]
    return read_cfg("quick/asag_a_shapes", [*small, *opts])


def refuses(cfg, *words):
    with pytest.raises(ConfigError) as error:
        check_config(cfg)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(("key", "value", "words"), [
    (f"{NODE}.HIDDEN_DIM", 64, ["MODEL.FPN.OUT_CHANNELS is 32", f"{NODE}.HIDDEN_DIM is 64"]),
    (f"{NODE}.NHEADS", 5, [f"{NODE}.HIDDEN_DIM 32", f"multiple of {NODE}.NHEADS 5"]),
    (f"{NODE}.NHEADS", 0, [f"{NODE}.NHEADS is 0", "at least 1"]),
    (f"{NODE}.NUM_DYNAMIC", 3, [f"{NODE}.NUM_DYNAMIC is 3", "one of 2"]),
    (f"{NODE}.BOX_WEIGHTS", (1.0, 1.0), ["BOX_WEIGHTS is (1.0, 1.0)", "four numbers above 0"]),
    (f"{NODE}.BOX_WEIGHTS", (2.0, 2.0, 1.0, 0.0), ["BOX_WEIGHTS", "four numbers above 0"]),
    (f"{NODE}.NUM_CLASSES", 0, [f"{NODE}.NUM_CLASSES is 0", "write the number"]),
    (f"{NODE}.NUM_PROPOSALS", 0, [f"{NODE}.NUM_PROPOSALS is 0", "at least 1"]),
    (f"{NODE}.ACTIVATION", "tanh", [f"{NODE}.ACTIVATION is 'tanh'", "relu, gelu"]),
    (f"{NODE}.OVERLAP", "l1", ["OVERLAP is 'l1'", "iou, giou, diou, ciou"]),
    (f"{NODE}.PROPOSALS.BOXES", "corner", ["'corner'", "image, center, grid, random"]),
    (f"{NODE}.INFERENCE_STAGES", 3, ["INFERENCE_STAGES is 3; write 0 to 2", "NUM_HEADS 2"]),
    ("TEST.MAX_DETECTIONS", 0, ["TEST.MAX_DETECTIONS is 0", "at least 1"]),
    ("TEST.MAX_DETECTIONS", 300, ["is 300", "the model makes 100", "PER_IMAGE 300"]),
    (f"{NODE}.NMS.ENABLED", "yes", ["NMS.ENABLED is 'yes'", "True, False or None"]),
    (f"{NODE}.NMS.THRESHOLD", 7.0, ["NMS.THRESHOLD is 7.0", "from 0 to 1"]),
    (f"{NODE}.DLA.NORMALIZER", "fg", ["'fg'", "positives, gt"]),
    (f"{NODE}.DLA.TOP_Q", 0, ["DLA.TOP_Q is 0", "at least 1"]),
    (f"{NODE}.DLA.STATIC_UNITS", -1, ["DLA.STATIC_UNITS is -1", "at least 0"]),
    (f"{NODE}.DLA.EPSILON", 0.0, ["DLA.EPSILON is 0.0", "above 0"]),
    (f"{NODE}.DLA.MAX_POSITIVE_FRACTION", 1.5, ["FRACTION is 1.5", "at most 1"]),
    (f"{NODE}.DPG.NORM", "LN", ["DPG.NORM is 'LN'", "BN, SyncBN, FrozenBN, GN"]),
    ("MODEL.ROI_HEADS.IN_FEATURES", ["p5", "p4", "p3", "p2"], ["finest first", "'p2', 'p3', 'p4'"]),
    ("MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p4"], ["follow each other", "['p2', 'p3', 'p4']"]),
    ("MODEL.ROI_HEADS.IN_FEATURES", ["p3", "p3"], ["follow each other", "['p3']"]),
    (f"{NODE}.PROPOSALS.NAME", "LearnedQueries", ["needs boxes and features", "LearnedProposals"]),
    (f"{NODE}.PROPOSALS.NAME", "EncoderQueries", ["needs boxes and features", "DenseDistinct"]),
    (f"{NODE}.DPG.NUM_EXPERTS", 0, ["DPG.NUM_EXPERTS is 0", "at least 1"]),
    (f"{NODE}.DPG.TAU_END", 0.0, ["DPG.TAU_END is 0.0", "above 0"]),
    (f"{NODE}.DPG.TAU_ITERS", -1, ["DPG.TAU_ITERS is -1", "None or a number"]),
    ("MODEL.ACTIVATION_CHECKPOINT", ("heads",), ["'heads'", "backbone, stages"]),
    ("SOLVER.OPTIMIZER", "ADAM", ["SOLVER.OPTIMIZER is 'ADAM'", "ADAMW, SGD"]),
    ("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "model", ["'model'", "full_model, norm, value"]),
    ("SOLVER.AMP.PRECISION", "fp8", ["'fp8'", "bf16, fp16"]),
    ("SOLVER.ACCUMULATE", 0, ["SOLVER.ACCUMULATE is 0", "at least 1"]),
    ("SOLVER.NO_DECAY", ("norms",), ["'norms'", "norm, bias, embedding"]),
    ("SOLVER.LAYER_DECAY", 1.5, ["SOLVER.LAYER_DECAY is 1.5", "at most 1"]),
    ("SOLVER.EPOCHS.EVAL", 1.0, ["SOLVER.EPOCHS.MAX is 0", "number of epochs"]),
    ("SOLVER.EPOCHS.STEPS", (8, 11), ["SOLVER.EPOCHS.MAX is 0"]),
    ("MODEL.EMA.DECAY", 0.0, ["MODEL.EMA.DECAY is 0.0", "above 0"]),
    ("TEST.BEST.METRIC", "validation/loss_ce", ["TEST.LOSS is False", "TEST.LOSS True"]),
    ("INPUT.AUG.WARP.SCALE", (1.2, 0.8), ["SCALE is (1.2, 0.8)", "the smallest and the largest"]),
    ("INPUT.AUG.WARP.PERSPECTIVE", 0.5, ["INPUT.AUG.WARP.PERSPECTIVE is 0.5", "below 0.5"]),
    ("INPUT.RANDOM_FLIP", "both", ["INPUT.RANDOM_FLIP is 'both'", "one of none"]),
    ("INPUT.PAD_TO", -1, ["INPUT.PAD_TO is -1", "at least 0"]),
    ("INPUT.AUG.HSV.PROB", 1.5, ["INPUT.AUG.HSV.PROB is 1.5", "from 0 to 1"]),
    ("INPUT.AUG.MIN_VISIBLE", -0.1, ["INPUT.AUG.MIN_VISIBLE is -0.1", "from 0 to 1"]),
    ("INPUT.AUG.MOSAIC.SIZE", 0, ["INPUT.AUG.MOSAIC.SIZE is 0", "at least 32"]),
    ("INPUT.AUG.SCALE_JITTER.SIZE", 8, ["INPUT.AUG.SCALE_JITTER.SIZE is 8", "at least 32"]),
    ("LOG.LEVEL", "loud", ["LOG.LEVEL is 'loud'", "normal, verbose"]),
])  # fmt: skip
def test_an_invalid_value_is_refused(key, value, words):
    refuses(tiny_cfg(key, value), *words)


@pytest.mark.parametrize("value", [math.inf, math.nan, "1"])
def test_weights_of_the_box_coder_are_finite_numbers(value):
    with pytest.raises(ConfigError, match=r"BOX_WEIGHTS is \(2\.0, .*; write"):
        tiny_cfg(f"{NODE}.BOX_WEIGHTS", (2.0, 2.0, 1.0, value))


@pytest.mark.parametrize(("opts", "words"), [
    (["MODE", "sparse"], "SQR.MODE is 'sparse'"),
    (["CHUNK", -1], "SQR.CHUNK is -1"),
    (["START", 0], "SQR.START is 0; write the number of plain stages, from 1 to 4"),
    (["START", 5], "SQR.START is 5"),
])  # fmt: skip
def test_an_invalid_value_of_recollection_is_refused_by_every_way_to_build_a_model(opts, words):
    cfg = tiny_cfg(*SQR, f"{NODE}.SQR.{opts[0]}", opts[1])
    refuses(cfg, words)
    with pytest.raises(ConfigError, match=words):
        build_model(cfg)


def test_recollection_needs_losses_on_every_stage():
    refuses(tiny_cfg(*SQR, f"{NODE}.DEEP_SUPERVISION", False), "DEEP_SUPERVISION True")


def test_attention_windows_are_for_plain_vision_transformers():
    window = ("MODEL.TIMM.WINDOW", 14, "MODEL.BACKBONE.NAME")
    for name in ("build_resnet_fpn_backbone", "build_timm_fpn_backbone", "build_timm_backbone"):
        refuses(
            tiny_cfg(*window, name), "MODEL.TIMM.WINDOW is 14", name, "build_timm_vit_fpn_backbone"
        )
    check_config(tiny_cfg(*window, "build_timm_vit_fpn_backbone"))


def test_windows_of_a_backbone_of_the_user_are_not_refused(monkeypatch):
    def build_my_backbone(cfg, input_shape):
        """A backbone with windows."""

    monkeypatch.setitem(BACKBONE_REGISTRY._obj_map, "build_my_backbone", build_my_backbone)
    check_config(tiny_cfg("MODEL.TIMM.WINDOW", 14, "MODEL.BACKBONE.NAME", "build_my_backbone"))


def test_patience_needs_a_metric():
    opts = ["TEST.BEST.METRIC", "", "TEST.BEST.PATIENCE", 2]
    refuses(tiny_cfg(*opts), "which is empty", "PATIENCE 0")


@pytest.mark.parametrize(("opts", "words"), [
    ([f"{NODE}.DLA.ENABLED", True], "DLA"), ([f"{NODE}.DPG.ENABLED", True], "DPG"),
    ([f"{NODE}.SQR.ENABLED", True], "SQR"),
    ([f"{NODE}.USE_FOCAL", False], "USE_FOCAL"),
    ([f"{NODE}.OVERLAP", "ciou"], "OVERLAP giou"),
    ([f"{NODE}.SHARE_STAGES", True], "SHARE_STAGES False"),
    ([f"{NODE}.DEEP_SUPERVISION", False], "DEEP_SUPERVISION True"),
    ([f"{NODE}.DROPOUT", 0.1], "DROPOUT 0.0"),
    ([f"{NODE}.ACTIVATION", "relu"], "ACTIVATION gelu"),
    ([f"{NODE}.BOX_WEIGHTS", (10.0, 10.0, 5.0, 5.0)], "no effect in ASAG"),
    (["MODEL.COMPILE", True], "MODEL.COMPILE False"),
    (["MODEL.ACTIVATION_CHECKPOINT", ("stages",)], "Leave out 'stages'"),
    ([f"{ASAG}.GUIDED_PART", 1.0], "GUIDED_PART"),
    ([f"{ASAG}.DECODER", "DETR"], "AdaMixer, SparseRCNN"),
    ([f"{ASAG}.USED_HEAD", 4], "from 0 to 3"),
    ([f"{ASAG}.NUM_DECODERS", 0], "NUM_DECODERS"),
    ([f"{ASAG}.DN.NUM", 0], "DN"),
    ([f"{ASAG}.ANCHORS.INFERENCE_LEVEL", "P2P6"], "P4P6"),
    ([f"{ASAG}.ANCHORS.LOW", 0.8], "LOW 0.8"),
    ([f"{ASAG}.ANCHORS.MAX", 2], "ANCHORS.MAX"),
    ([f"{ASAG}.ANCHORS.MAX_PATCHES", -1], "MAX_PATCHES"),
])  # fmt: skip
def test_an_invalid_value_of_asag_is_refused(opts, words):
    refuses(asag_cfg(*opts), words)


@pytest.mark.parametrize(("opts", "words"), [
    (["MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlignV2"], "POOLER_TYPE ROIAlign"),
    (["MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p3", "p4"]], "p2, p3, p4, p5"),
])  # fmt: skip
def test_asag_refuses_parts_that_do_not_fit_when_it_is_built(opts, words):
    with pytest.raises(ConfigError, match=words):
        build_model(asag_cfg(*opts))


@pytest.mark.parametrize("opts", [
    ["SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "value", "SOLVER.OPTIMIZER", "SGD"],
    ["SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "norm"],
    ["TEST.BEST.METRIC", "validation/loss_ce", "TEST.LOSS", True],
    [*SQR, f"{NODE}.SQR.START", 5, f"{NODE}.SQR.MODE", "dense"],  # does not use START
    [*SQR, f"{NODE}.SQR.START", 5, f"{NODE}.SQR.ENABLED", False],
    ["MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "MODEL.RPN.IN_FEATURES", ["p4"],
     f"{NODE}.NUM_PROPOSALS", 0],
])  # fmt: skip
def test_valid_and_unused_values_are_accepted(opts):
    check_config(tiny_cfg(*opts))


def test_keys_of_detectron2_without_effect_are_refused():
    refuses(tiny_cfg("SOLVER.WEIGHT_DECAY_NORM", 0.1), "WEIGHT_DECAY_NORM is 0.1", "NO_DECAY")
    refuses(tiny_cfg("VIS_PERIOD", 100), "VIS_PERIOD is 100", "LOG.IMAGES")
    load_cfg("quick/faster_rcnn_shapes", ["MODEL.DEVICE", "cpu", "VIS_PERIOD", 100])  # draws


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cuda_without_a_gpu_becomes_the_cpu_with_a_warning(monkeypatch, messages, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cfg = load_cfg("quick/sparse_rcnn_shapes", ["MODEL.DEVICE", device])
    assert cfg.MODEL.DEVICE == "cpu"
    (warning,) = messages()
    assert f"MODEL.DEVICE is {device!r}" in warning
    assert "running on the CPU" in warning


@pytest.mark.parametrize(("gpu", "device"), [(True, "cuda"), (True, "cpu"), (False, "cpu")])
def test_an_available_device_is_kept_without_a_warning(monkeypatch, messages, gpu, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    cfg = read_cfg("quick/sparse_rcnn_shapes", ["MODEL.DEVICE", device])
    choose_device(cfg)
    assert device == cfg.MODEL.DEVICE
    assert messages() == []


@pytest.mark.parametrize(("opts", "key"), [
    (["INPUT.CROP.ENABLED", True], "INPUT.CROP.ENABLED"),
    (["INPUT.AUG.SCALE_JITTER.SIZE", 640], "INPUT.AUG.SCALE_JITTER.SIZE"),
])  # fmt: skip
def test_cropping_of_polygons_needs_shapely(opts, key, monkeypatch):
    monkeypatch.setattr(validate, "find_spec", lambda name: None)
    name = "dynamic_rcnn/mask_rcnn_dynamic_R_50_FPN_1x"
    words = f"{key} crops", "pip install shapely", "INPUT.MASK_FORMAT bitmask"
    refuses(read_cfg(name, opts), *words)
    for accepted in (["INPUT.MASK_FORMAT", "bitmask"], ["MODEL.MASK_ON", False]):
        check_config(read_cfg(name, [*opts, *accepted]))
    monkeypatch.setattr(validate, "find_spec", lambda name: object())
    check_config(read_cfg(name, opts))
