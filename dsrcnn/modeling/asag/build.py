"""ASAG's parts from a config."""

from detectron2.config import CfgNode

from ...errors import ConfigError
from ..decoder import AdaMixerStage, RCNNHead, RoIFeatures
from ..decoder.rcnn_head import stride_of
from .anchor_generator import AnchorGenerator
from .patches import ProbingRule
from .queries import ParallelDecoders

__all__ = ["LEVELS_PROBED", "build_decoders", "build_generator"]

LEVELS_PROBED = {"P5P6": 0, "P4P6": 1, "P3P6": 2}  # by MODEL.ASAG.ANCHORS.INFERENCE_LEVEL


def build_generator(cfg: CfgNode) -> AnchorGenerator:
    """The anchor generator of `MODEL.ASAG.ANCHORS`."""
    node = cfg.MODEL.ASAG.ANCHORS
    rule = ProbingRule(
        low=node.LOW,
        high=node.HIGH,
        overlap=node.OVERLAP,
        output=node.OUTPUT,
        least=node.MIN,
        most=node.MAX,
        min_side=node.MIN_SIDE,
        max_patches=node.MAX_PATCHES,
        min_chosen=node.MIN_CHOSEN,
        levels=LEVELS_PROBED[node.INFERENCE_LEVEL],
    )
    return AnchorGenerator(
        channels=cfg.MODEL.FPN.OUT_CHANNELS,
        compressed=node.COMPRESSED,
        cells=node.CELLS,
        hidden=node.HIDDEN,
        fixed_anchors=node.FIXED,
        probed_anchors=node.PROBED,
        rule=rule,
        norms_at_random=cfg.MODEL.ASAG.OFFICIAL_QUIRKS,
    )


def build_decoders(cfg: CfgNode) -> ParallelDecoders:
    """The decoders of `MODEL.ASAG`, and what pools for them.

    Raises:
        ConfigError: if another RoIAlign is asked for, or other levels.
    """
    node, own, pooler = cfg.MODEL.SparseRCNN, cfg.MODEL.ASAG, cfg.MODEL.ROI_BOX_HEAD
    if pooler.POOLER_TYPE != "ROIAlign":
        raise ConfigError(
            f"MODEL.ROI_BOX_HEAD.POOLER_TYPE is {pooler.POOLER_TYPE!r}; ASAG pools with 'ROIAlign' "
            "(without the half pixel's shift). Write MODEL.ROI_BOX_HEAD.POOLER_TYPE ROIAlign."
        )
    names = list(cfg.MODEL.ROI_HEADS.IN_FEATURES)
    strides = tuple(stride_of(name) for name in names)
    if strides != (4, 8, 16, 32):
        raise ConfigError(
            f"MODEL.ROI_HEADS.IN_FEATURES is {names}; ASAG probes p3 to p5 and samples p2 to p5. "
            "Write [p2, p3, p4, p5]."
        )
    # Both are as in their papers but for activation, towers and how AdaMixer's box is written.
    stage: AdaMixerStage | RCNNHead
    if own.DECODER == "AdaMixer":
        theirs = AdaMixerStage.from_config(cfg)
        ours = {"num_cls": node.NUM_CLS, "num_reg": node.NUM_REG, "tower_bias": False}
        ours |= {"unit": 4.0, "ratio_scale": 0.5, "grid": False}
        stage = AdaMixerStage(**{**theirs, **ours})
    else:
        theirs = RCNNHead.from_config(cfg)
        stage = RCNNHead(**theirs, tower_activation=node.ACTIVATION)
    return ParallelDecoders(
        stage,
        channels=node.HIDDEN_DIM,
        strides=strides,
        rois=RoIFeatures(
            strides=strides,
            resolution=pooler.POOLER_RESOLUTION,
            samples=pooler.POOLER_SAMPLING_RATIO,
            aligned=False,
        ),
        count=own.NUM_DECODERS,
        used=own.USED_HEAD,
        prior_probability=node.PRIOR_PROB,
    )
