"""Config values out of range: each is one message that names the key and what to write."""

import math

import pytest
from conftest import SMALL

from dsrcnn.config import check_config, load_cfg, read_cfg
from dsrcnn.errors import ConfigError

NODE = "MODEL.SparseRCNN"
SHAPES = "quick/sparse_rcnn_shapes"
FASTER = "quick/dynamic_rcnn_shapes"
TTA = ("TEST.AUG.ENABLED", True)


def refused(name, opts, phrase):
    with pytest.raises(ConfigError) as caught:
        load_cfg(name, opts)
    message = str(caught.value)
    assert phrase in message
    assert "\n" not in message
    assert len(message) < 500
    assert not message.startswith("error")


VALUES = [
    # Schedule and optimizer.
    (["SOLVER.BASE_LR", -1.0], "SOLVER.BASE_LR is -1.0; write a number above 0"),
    (["SOLVER.BASE_LR", 0.0], "SOLVER.BASE_LR is 0.0"),
    (["SOLVER.BASE_LR", "None"], "SOLVER.BASE_LR is None; write a number, such as 0.001"),
    (["SOLVER.BASE_LR", math.nan], "SOLVER.BASE_LR is nan, which is not finite"),
    (["SOLVER.BASE_LR", math.inf], "SOLVER.BASE_LR is inf, which is not finite"),
    (["SOLVER.BASE_LR", "1e-3x"], "SOLVER.BASE_LR"),
    (["SOLVER.BASE_LR", "[0.1]"], "SOLVER.BASE_LR"),
    (["SOLVER.MAX_ITER", -5], "SOLVER.MAX_ITER is -5; write a number of at least 1"),
    (["SOLVER.MAX_ITER", 0], "SOLVER.MAX_ITER is 0"),
    (["SOLVER.MAX_ITER", 10**30], "SOLVER.MAX_ITER is 1000"),
    (["SOLVER.MAX_ITER", "1e4"], "SOLVER.MAX_ITER"),
    (["SOLVER.MAX_ITER", None], "SOLVER.MAX_ITER is None"),
    (["SOLVER.STEPS", (90, 60)], "SOLVER.STEPS is (90, 60); write whole numbers"),
    (["SOLVER.STEPS", (60, 60)], "each larger than the one before"),
    (["SOLVER.STEPS", (0,)], "SOLVER.STEPS is (0,)"),
    (["SOLVER.STEPS", ("late",)], "SOLVER.STEPS is ('late',)"),
    (["SOLVER.STEPS", (0.5,)], "SOLVER.STEPS is (0.5,)"),
    (["SOLVER.STEPS", None], "SOLVER.STEPS is None"),
    (["SOLVER.GAMMA", 0.0], "SOLVER.GAMMA is 0.0"),
    (["SOLVER.GAMMA", 3.0], "SOLVER.GAMMA is 3.0; write a number above 0, at most 1"),
    (["SOLVER.MOMENTUM", 1.0], "SOLVER.MOMENTUM is 1.0"),
    (["SOLVER.NESTEROV", True], "needs SOLVER.OPTIMIZER SGD"),
    (["SOLVER.WEIGHT_DECAY", -0.1], "SOLVER.WEIGHT_DECAY is -0.1"),
    (["SOLVER.WEIGHT_DECAY_BIAS", -0.1], "SOLVER.WEIGHT_DECAY_BIAS is -0.1; write None or a num"),
    (["SOLVER.WARMUP_ITERS", -1], "SOLVER.WARMUP_ITERS is -1"),
    (["SOLVER.WARMUP_FACTOR", 2.0], "SOLVER.WARMUP_FACTOR is 2.0"),
    (["SOLVER.WARMUP_METHOD", "slow"], "SOLVER.WARMUP_METHOD is 'slow'; write one of linear"),
    (["SOLVER.LR_SCHEDULER_NAME", "Cosine"], "WarmupMultiStepLR, WarmupCosineLR"),
    (["SOLVER.IMS_PER_BATCH", 0], "SOLVER.IMS_PER_BATCH is 0"),
    (["SOLVER.IMS_PER_BATCH", 3, "SOLVER.REFERENCE_WORLD_SIZE", 2], "no multiple of SOLVER.REFER"),
    (["SOLVER.CHECKPOINT_PERIOD", -1], "SOLVER.CHECKPOINT_PERIOD is -1"),
    (["SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.0], "CLIP_VALUE is 0.0; write a number above 0"),
    (["SOLVER.CLIP_GRADIENTS.CLIP_VALUE", math.nan], "CLIP_VALUE is nan"),
    (["SOLVER.CLIP_GRADIENTS.NORM_TYPE", -2.0], "NORM_TYPE is -2.0"),
    (["SOLVER.BACKBONE_MULTIPLIER", -1.0], "SOLVER.BACKBONE_MULTIPLIER is -1.0"),
    (["SOLVER.EPOCHS.MAX", -1.0], "SOLVER.EPOCHS.MAX is -1.0"),
    (["SOLVER.EPOCHS.MAX", 3.0, "SOLVER.EPOCHS.STEPS", (2, 1)], "SOLVER.EPOCHS.STEPS is (2, 1)"),
    (["SOLVER.EPOCHS.MAX", math.inf], "SOLVER.EPOCHS.MAX is inf"),
    (["MODEL.EMA.DECAY", 1.0], "MODEL.EMA.DECAY is 1.0; write a number above 0 and below 1"),
    # Images.
    (["INPUT.MIN_SIZE_TRAIN", ()], "INPUT.MIN_SIZE_TRAIN is (); write numbers of pixels"),
    (["INPUT.MIN_SIZE_TRAIN", (-64,)], "INPUT.MIN_SIZE_TRAIN is (-64,)"),
    (["INPUT.MIN_SIZE_TRAIN", ("64",)], "INPUT.MIN_SIZE_TRAIN is ('64',)"),
    (["INPUT.MIN_SIZE_TRAIN", "64"], "INPUT.MIN_SIZE_TRAIN"),
    (["INPUT.MIN_SIZE_TRAIN_SAMPLING", "any"], "MIN_SIZE_TRAIN_SAMPLING is 'any'"),
    (["INPUT.MIN_SIZE_TRAIN_SAMPLING", "range", "INPUT.MIN_SIZE_TRAIN", (64,)], "and the largest"),
    (["INPUT.MIN_SIZE_TRAIN_SAMPLING", "range", "INPUT.MIN_SIZE_TRAIN", (96, 64)], "is (96, 64)"),
    (["INPUT.MIN_SIZE_TEST", -1], "INPUT.MIN_SIZE_TEST is -1"),
    (["INPUT.MAX_SIZE_TRAIN", 0], "INPUT.MAX_SIZE_TRAIN is 0"),
    (["INPUT.MAX_SIZE_TEST", 10**9], "INPUT.MAX_SIZE_TEST is 1000000000"),
    (["INPUT.CROP.SIZE", [0, 0]], "INPUT.CROP.SIZE is (0, 0); write height and width"),
    (["INPUT.CROP.SIZE", [0.5]], "INPUT.CROP.SIZE is (0.5,)"),
    (["INPUT.CROP.TYPE", "round"], "INPUT.CROP.TYPE is 'round'"),
    (["INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "relative", "INPUT.CROP.SIZE", [2, 2]],
     "needs fractions"),
    (["INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "absolute", "INPUT.CROP.SIZE", [0.5, 0.5]],
     "needs whole numbers of pixels"),
    (["INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "absolute_range", "INPUT.CROP.SIZE", [90, 60]],
     "the smallest and the largest number"),
    (["INPUT.FORMAT", "XYZ"], "INPUT.FORMAT is 'XYZ'; write one of RGB, BGR"),
    (["INPUT.FORMAT", ""], "INPUT.FORMAT is ''"),
    (["INPUT.MASK_FORMAT", "rle"], "INPUT.MASK_FORMAT is 'rle'"),
    (["MODEL.PIXEL_STD", [0.0, 1.0, 1.0]], "MODEL.PIXEL_STD is (0.0, 1.0, 1.0); write three"),
    (["MODEL.PIXEL_STD", [1.0]], "MODEL.PIXEL_STD is (1.0,)"),
    (["MODEL.PIXEL_MEAN", [1.0, 2.0]], "MODEL.PIXEL_MEAN is (1.0, 2.0); write three numbers"),
    (["MODEL.PIXEL_MEAN", [1.0, math.nan, 1.0]], "MODEL.PIXEL_MEAN is (1.0, nan, 1.0), which"),
    (["MODEL.PIXEL_MEAN", ["a", "b", "c"]], "MODEL.PIXEL_MEAN is ('a', 'b', 'c')"),
    # The model.
    (["MODEL.RESNETS.DEPTH", 19], "MODEL.RESNETS.DEPTH is 19; write one of 18, 34, 50, 101, 152"),
    (["MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.NORM", "XN"], "MODEL.RESNETS.NORM is 'XN'"),
    (["MODEL.RESNETS.NUM_GROUPS", 0], "MODEL.RESNETS.NUM_GROUPS is 0"),
    (["MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 256], "DEPTH 18 needs 64"),
    (["MODEL.RESNETS.RES5_DILATION", 3], "MODEL.RESNETS.RES5_DILATION is 3"),
    (["MODEL.RESNETS.OUT_FEATURES", ["res9"]], "MODEL.RESNETS.OUT_FEATURES is ('res9',)"),
    (["MODEL.RESNETS.DEFORM_ON_PER_STAGE", [True]], "DEFORM_ON_PER_STAGE is (True,)"),
    (["MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64,
      "MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, False, True, True]], "no deformable conv"),
    (["MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.RES2_OUT_CHANNELS", 256,
      "MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, True, True, True],
      "MODEL.RESNETS.DEFORM_NUM_GROUPS", 3], "does not divide the 128 channels of res3"),
    (["MODEL.FPN.IN_FEATURES", ["res2", "res4"]], "consecutive maps"),
    (["MODEL.FPN.IN_FEATURES", []], "MODEL.FPN.IN_FEATURES is ()"),
    (["MODEL.BACKBONE.NAME", "build_timm_fpn_backbone", "MODEL.FPN.IN_FEATURES", ["stem"]],
     "write consecutive maps of MODEL.TIMM ('res2', 'res3', 'res4', 'res5')"),
    (["MODEL.BACKBONE.NAME", "build_timm_fpn_backbone", "MODEL.FPN.IN_FEATURES",
      ["res4", "res3"]], "MODEL.FPN.IN_FEATURES is ('res4', 'res3')"),
    (["MODEL.FPN.NORM", "XN"], "MODEL.FPN.NORM is 'XN'; write one of '', BN"),
    (["MODEL.FPN.FUSE_TYPE", "max"], "MODEL.FPN.FUSE_TYPE is 'max'"),
    (["MODEL.FPN.OUT_CHANNELS", 40, f"{NODE}.HIDDEN_DIM", 40, "MODEL.FPN.NORM", "GN"], "of 32"),
    (["MODEL.BACKBONE.FREEZE_AT", 9], "MODEL.BACKBONE.FREEZE_AT is 9"),
    (["MODEL.BACKBONE.NAME", "resnet"], "MODEL.BACKBONE.NAME is 'resnet'; write one of"),
    (["MODEL.META_ARCHITECTURE", ""], "MODEL.META_ARCHITECTURE is ''; write one of"),
    (["MODEL.ROI_HEADS.IN_FEATURES", ["p9"]], "MODEL.ROI_HEADS.IN_FEATURES is ('p9',)"),
    (["MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 0], "POOLER_RESOLUTION is 0"),
    (["MODEL.ROI_BOX_HEAD.POOLER_TYPE", "Pool"], "POOLER_TYPE is 'Pool'; write one of ROIAlignV2"),
    (["MODEL.DEVICE", "cudaa"], "MODEL.DEVICE is 'cudaa'; write cpu, cuda, or cuda:1"),
    (["MODEL.DEVICE", ""], "MODEL.DEVICE is ''"),
    (["MODEL.DEVICE", "cuda:x"], "MODEL.DEVICE is 'cuda:x'"),
    (["MODEL.DEVICE", "meta"], "MODEL.DEVICE is 'meta'"),
    (["MODEL.MASK_ON", True], "predicts boxes only"),
    (["MODEL.KEYPOINT_ON", True], "MODEL.KEYPOINT_ON is True; write False"),
    (["MODEL.LOAD_PROPOSALS", True], "MODEL.LOAD_PROPOSALS is True"),
    (["MODEL.WEIGHTS", "a\0b"], "remove the NUL character"),
    ([f"{NODE}.PRIOR_PROB", 2.0], f"{NODE}.PRIOR_PROB is 2.0; write a number above 0 and below 1"),
    ([f"{NODE}.PRIOR_PROB", 0.0], f"{NODE}.PRIOR_PROB is 0.0"),
    ([f"{NODE}.ALPHA", -0.5], f"{NODE}.ALPHA is -0.5"),
    ([f"{NODE}.GAMMA", -1.0], f"{NODE}.GAMMA is -1.0"),
    ([f"{NODE}.DROPOUT", 2.0], f"{NODE}.DROPOUT is 2.0; write a number from 0 to below 1"),
    ([f"{NODE}.CLASS_WEIGHT", -1.0], f"{NODE}.CLASS_WEIGHT is -1.0"),
    ([f"{NODE}.L1_WEIGHT", math.nan], f"{NODE}.L1_WEIGHT is nan"),
    ([x for k in ("CLASS", "L1", "GIOU") for x in (f"{NODE}.{k}_WEIGHT", 0.0)], "nothing would be"),
    ([f"{NODE}.NUM_PROPOSALS", 10**12], f"{NODE}.NUM_PROPOSALS is 1000000000000"),
    ([f"{NODE}.DIM_FEEDFORWARD", -8], f"{NODE}.DIM_FEEDFORWARD is -8"),
    ([f"{NODE}.DLA.CLASS_COST", -1.0], "DLA.CLASS_COST is -1.0"),
    # Data, tests, surroundings.
    (["DATALOADER.NUM_WORKERS", -1], "DATALOADER.NUM_WORKERS is -1"),
    (["DATALOADER.SAMPLER_TRAIN", "Random"], "SAMPLER_TRAIN is 'Random'; write one of Training"),
    (["DATALOADER.REPEAT_THRESHOLD", 2.0], "DATALOADER.REPEAT_THRESHOLD is 2.0"),
    (["DATASETS.TRAIN", (1,)], "DATASETS.TRAIN is (1,); write names"),
    (["DATASETS.TRAIN", "shapes_train"], "DATASETS.TRAIN"),
    (["DATASETS.TEST", ("",)], "DATASETS.TEST is ('',)"),
    (["DATASETS.PROPOSAL_FILES_TRAIN", ("x.pkl",)], "proposals are not loaded"),
    (["DATASETS.CUSTOM.CLASSES", (1, 2)], "DATASETS.CUSTOM.CLASSES is (1, 2)"),
    (["TEST.DETECTIONS_PER_IMAGE", 0], "TEST.DETECTIONS_PER_IMAGE is 0"),
    (["TEST.EVAL_PERIOD", -1], "TEST.EVAL_PERIOD is -1"),
    (["TEST.AUG.MIN_SIZES", ()], "TEST.AUG.MIN_SIZES is ()"),
    ([*TTA, "TEST.AUG.MIN_SIZES", (64, 96)], "13 pairs for the 2 sizes"),
    ([*TTA, "TEST.AUG.MIN_SIZES", (64,), "TEST.AUG.SCALE_RANGES", (1,)], "0 pairs for the 1"),
    (["TEST.EXPECTED_RESULTS", [["bbox", "AP"]]], "entries such as ['bbox', 'AP', 38.5, 0.2]"),
    (["TEST.EXPECTED_RESULTS", [1]], "TEST.EXPECTED_RESULTS is (1,)"),
    (["TEST.PRECISE_BN.NUM_ITER", 0], "TEST.PRECISE_BN.NUM_ITER is 0"),
    (["SEED", 10**20], "SEED is 100000000000000000000; write a number up to 4000000000"),
    (["SEED", None], "SEED is None"),
    (["SEED", "lucky"], "SEED"),
    (["SEED", 1.5], "SEED"),
    (["CUDNN_BENCHMARK", None], "CUDNN_BENCHMARK is None; write True or False"),
    (["DISTRIBUTED_TIMEOUT", 0.0], "DISTRIBUTED_TIMEOUT is 0.0"),
    (["OUTPUT_DIR", ""], "OUTPUT_DIR is ''"),
    (["OUTPUT_DIR", "a\0b"], "OUTPUT_DIR is 'a\\x00b'; remove the NUL"),
    (["OUTPUT_DIR", None], "OUTPUT_DIR is None; write text"),
    (["VERSION", 3], "VERSION is 3"),
    (["LOG.PERIOD", -1], "LOG.PERIOD is -1"),
]  # fmt: skip
FASTER_VALUES = [
    (["MODEL.ANCHOR_GENERATOR.SIZES", [[0]]], "ANCHOR_GENERATOR.SIZES is ([0],)"),
    (["MODEL.ANCHOR_GENERATOR.SIZES", [[8], [16]]], "has 2 entries for the"),
    (["MODEL.ANCHOR_GENERATOR.SIZES", [[8, 9], [16], [32], [64], [99]]], "different numbers of"),
    ([f"{NODE}.DLA.ENABLED", True], "DLA.ENABLED is True, which has no effect in Gener"),
    ([f"{NODE}.DPG.ENABLED", True], "DPG.ENABLED is True, which has no effect in Gener"),
    ([f"{NODE}.SQR.ENABLED", True], "SQR.ENABLED is True, which has no effect in Gener"),
    (["MODEL.ANCHOR_GENERATOR.NAME", "None"], "MODEL.ANCHOR_GENERATOR.NAME is 'None'"),
    (["MODEL.PROPOSAL_GENERATOR.NAME", "RPM"], "MODEL.PROPOSAL_GENERATOR.NAME is 'RPM'"),
    (["MODEL.RPN.HEAD_NAME", "Head"], "MODEL.RPN.HEAD_NAME is 'Head'"),
    (["MODEL.RPN.IN_FEATURES", ["p1", "p2", "p3", "p4", "p5"]], "IN_FEATURES is ('p1',"),
    (["MODEL.RPN.IOU_THRESHOLDS", [0.7, 0.3]], "two numbers from 0 to 1, ascending"),
    (["MODEL.RPN.NMS_THRESH", 7.0], "MODEL.RPN.NMS_THRESH is 7.0"),
    (["MODEL.RPN.POST_NMS_TOPK_TRAIN", 0], "MODEL.RPN.POST_NMS_TOPK_TRAIN is 0"),
    (["MODEL.ROI_HEADS.NAME", "Heads"], "MODEL.ROI_HEADS.NAME is 'Heads'"),
    (["MODEL.ROI_HEADS.SCORE_THRESH_TEST", -1.0], "SCORE_THRESH_TEST is -1.0"),
    (["MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 0], "BATCH_SIZE_PER_IMAGE is 0"),
    (["MODEL.ROI_BOX_HEAD.NAME", "Head"], "MODEL.ROI_BOX_HEAD.NAME is 'Head'"),
    (["MODEL.ROI_BOX_HEAD.NUM_FC", -1], "MODEL.ROI_BOX_HEAD.NUM_FC is -1"),
    (["MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS", (1.0,)], "four numbers above 0"),
]  # fmt: skip


@pytest.mark.parametrize(("opts", "phrase"), VALUES)
def test_a_value_out_of_range_is_one_message(opts, phrase):
    refused(SHAPES, opts, phrase)


@pytest.mark.parametrize(("opts", "phrase"), FASTER_VALUES)
def test_a_value_out_of_range_of_faster_rcnn_is_one_message(opts, phrase):
    refused(FASTER, opts, phrase)


@pytest.mark.parametrize(("arguments", "phrase"), [
    ((None,), "The config file is None; write a path"), ((3,), "The config file is 3"),
    ((SHAPES, None), "Overrides are None; write a list"),
])  # fmt: skip
def test_an_argument_of_another_type_is_one_message(arguments, phrase):
    with pytest.raises(ConfigError, match=phrase):
        load_cfg(*arguments)


@pytest.mark.parametrize("value", [math.nan, math.inf, None, "text", [1.0]])
def test_a_value_set_in_python_is_checked_like_one_in_a_file(value):
    cfg = load_cfg(SHAPES)
    cfg.SOLVER.WEIGHT_DECAY = value
    with pytest.raises(ConfigError, match=r"SOLVER\.WEIGHT_DECAY is"):
        check_config(cfg)


@pytest.mark.parametrize("opts", [
    ["SOLVER.BASE_LR", "1"], ["SOLVER.BASE_LR", "2.5e-5"],
    ["SOLVER.STEPS", "()"], ["SOLVER.STEPS", "(210000, 250000)"], ["SOLVER.STEPS", "[600]"],
    ["SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "norm", "SOLVER.CLIP_GRADIENTS.NORM_TYPE", math.inf],
    ["SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "norm", "SOLVER.CLIP_GRADIENTS.NORM_TYPE", "inf"],
    ["SOLVER.WEIGHT_DECAY_BIAS", "None"], ["SOLVER.WEIGHT_DECAY_BIAS", "0"],
    ["SOLVER.OPTIMIZER", "SGD", "SOLVER.NESTEROV", "True"],
    ["SOLVER.CHECKPOINT_PERIOD", "0"], ["TEST.EVAL_PERIOD", "0"],
    ["INPUT.MIN_SIZE_TRAIN", "(64,)"], ["INPUT.MIN_SIZE_TRAIN", "[64, 96]"],
    ["INPUT.MIN_SIZE_TRAIN_SAMPLING", "range", "INPUT.MIN_SIZE_TRAIN", "(64, 96)"],
    ["INPUT.MIN_SIZE_TEST", "0"],  # no resizing
    ["INPUT.CROP.ENABLED", "True", "INPUT.CROP.TYPE", "relative", "INPUT.CROP.SIZE", "[0.5, 1]"],
    ["MODEL.BACKBONE.FREEZE_AT", "5"], ["MODEL.BACKBONE.FREEZE_AT", "-1"],
    ["MODEL.RESNETS.NORM", "BN"], ["MODEL.RESNETS.NORM", ""], ["MODEL.RESNETS.NORM", "SyncBN"],
    ["MODEL.ROI_HEADS.IN_FEATURES", "['p3','p4','p5','p6']"],
    ["MODEL.WEIGHTS", "file with spaces.pth"], ["MODEL.WEIGHTS", "detectron2://a/b.pkl"],
    ["DATALOADER.NUM_WORKERS", "0"], ["DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"],
    ["DATASETS.TEST", "()"], ["DATASETS.TRAIN", "('shapes_train','shapes_val')"],
    ["TEST.EXPECTED_RESULTS", "[['bbox', 'AP', 38.5, 0.2]]"],
    [*TTA, "TEST.AUG.MIN_SIZES", (64, 96), "TEST.AUG.SCALE_FILTER", False],
    ["SEED", "-1"], ["SEED", "0"], ["SEED", "4000000000"], ["SEED", "40244023"],
    ["MODEL.DEVICE", "cuda:0"], ["OUTPUT_DIR", "out put/ä"], ["OUTPUT_DIR", "12"],
    [f"{NODE}.ALPHA", "1"], [f"{NODE}.GAMMA", "0"], [f"{NODE}.NMS.ENABLED", "None"],
    [f"{NODE}.CLASS_WEIGHT", "0"],
])  # fmt: skip
def test_what_detectron2_users_write_is_accepted(opts):
    load_cfg(SHAPES, [str(word) if opts[0] == "OUTPUT_DIR" else word for word in opts])


def test_faster_rcnn_keeps_the_values_of_detectron2():
    opts = ["MODEL.ANCHOR_GENERATOR.SIZES", [[32, 64, 128]], "MODEL.RPN.CONV_DIMS", [-1, 64]]
    load_cfg(FASTER, [*opts, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0])


def test_a_small_config_of_the_tests_is_within_the_rules():
    check_config(read_cfg(SHAPES, [*SMALL, f"{NODE}.NUM_CLASSES", 5]))
