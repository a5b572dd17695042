"""Configs of ASAG that make no sense, refused with what to write."""

import pytest
from detectron2.modeling import build_model

from dsrcnn.config import check_config, read_cfg
from dsrcnn.errors import ConfigError

KEY = "MODEL.ASAG."


def cfg_of(*opts):
    small = ["MODEL.DEVICE", "cpu", "MODEL.SparseRCNN.NUM_CLASSES", 5]
    return read_cfg("quick/asag_a_shapes", [*small, *opts])


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["MODEL.SparseRCNN.DLA.ENABLED", True], "DLA"),
        (["MODEL.SparseRCNN.DPG.ENABLED", True], "DPG"),
        (["MODEL.SparseRCNN.SQR.ENABLED", True], "SQR"),
        (["MODEL.SparseRCNN.USE_FOCAL", False], "USE_FOCAL"),
        (["MODEL.SparseRCNN.OVERLAP.LOSS", "ciou"], "OVERLAP.LOSS giou"),
        (["MODEL.SparseRCNN.OVERLAP.COST", "iou"], "OVERLAP.COST giou"),
        (["MODEL.SparseRCNN.DEEP_SUPERVISION", False], "DEEP_SUPERVISION True"),
        (["MODEL.SparseRCNN.DROPOUT", 0.1], "DROPOUT 0.0"),
        (["MODEL.SparseRCNN.ACTIVATION", "relu"], "ACTIVATION gelu"),
        ([f"{KEY}GUIDED_PART", 1.0], "GUIDED_PART"),
        (["MODEL.COMPILE", True], "MODEL.COMPILE False"),
        (["MODEL.CHECKPOINT.STAGES", True], "MODEL.CHECKPOINT.STAGES False"),
        ([f"{KEY}DECODER", "DETR"], "AdaMixer, SparseRCNN"),
        ([f"{KEY}USED_HEAD", 4], "from 0 to 3"),
        ([f"{KEY}NUM_DECODERS", 0], "NUM_DECODERS"),
        ([f"{KEY}SMALL_OBJECT_WEIGHT", 0.5], "SMALL_OBJECT_WEIGHT"),
        ([f"{KEY}TRAIN_PATCHES", -1], "TRAIN_PATCHES"),
        ([f"{KEY}DN.NUM", 0], "DN"),
        ([f"{KEY}ANCHORS.INFERENCE_LEVEL", "P2P6"], "P4P6"),
        ([f"{KEY}ANCHORS.LOW", 0.8], "LOW 0.8"),
        ([f"{KEY}ANCHORS.MAX", 2], "ANCHORS.MAX"),
        ([f"{KEY}ANCHORS.MAX_PATCHES", -1], "MAX_PATCHES"),
        ([f"{KEY}ANCHORS.CELLS", 0], "CELLS"),
        ([f"{KEY}ANCHORS.OVERLAP", 1.5], "OVERLAP"),
        (["MODEL.AdaMixer.GROUPS", 3], "GROUPS"),
    ],
)
def test_what_makes_no_sense_is_refused(opts, message):
    with pytest.raises(ConfigError, match=message):
        check_config(cfg_of(*opts))


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlignV2"], "POOLER_TYPE ROIAlign"),
        (["MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p3", "p4"]], "p2, p3, p4, p5"),
    ],
)
def test_parts_that_do_not_fit_are_refused(opts, message):
    with pytest.raises(ConfigError, match=message):
        build_model(cfg_of(*opts))
