"""Checks of a config, and the choice of the device."""

import pytest
import torch
from conftest import tiny_cfg

from dsrcnn import load_cfg
from dsrcnn.config import check_config, choose_device, read_cfg
from dsrcnn.errors import ConfigError

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
