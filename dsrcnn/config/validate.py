"""Checks of a config against itself and the machine; an error says what to write."""

import logging

import torch
from detectron2.config import CfgNode
from detectron2.modeling import BACKBONE_REGISTRY

from ..errors import ConfigError
from ..structures import OVERLAPS
from .validate_asag import check_asag
from .validate_data import check_augmentation
from .validate_training import check_training, expect_one_of

__all__ = ["CASCADES", "SPARSE_DETECTORS", "check_config", "check_model", "choose_device"]

# Architectures that are cascades of stages, with their keys under MODEL.SparseRCNN.
CASCADES = ("SparseRCNN", "DynamicSparseRCNN", "AdaMixer")
# Those that have at least classes, sizes of layers and loss weights there.
SPARSE_DETECTORS = (*CASCADES, "ASAG")
_LOGGER = logging.getLogger(__name__)


def check_config(cfg: CfgNode) -> None:
    """Reject combinations that would fail later and less clearly.

    Raises:
        ConfigError: naming key, value found and value expected.
    """
    check_model(cfg)
    check_augmentation(cfg)
    check_training(cfg)


def check_model(cfg: CfgNode) -> None:
    """The part of `check_config` that a model needs; models do it as they are built.

    Raises:
        ConfigError: naming key, value found and value expected.
    """
    if cfg.MODEL.META_ARCHITECTURE in SPARSE_DETECTORS:
        _check_sparse_rcnn(cfg)
        _check_adamixer(cfg)
    if cfg.MODEL.META_ARCHITECTURE == "ASAG":
        check_asag(cfg)
    if cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN":
        _check_generalized_rcnn(cfg)
    _check_backbone(cfg)


def _check_backbone(cfg: CfgNode) -> None:
    node = cfg.MODEL.NECK
    known = [name for name, _ in BACKBONE_REGISTRY]
    if cfg.MODEL.BACKBONE.NAME not in known:
        raise ConfigError(
            f"MODEL.BACKBONE.NAME is {cfg.MODEL.BACKBONE.NAME!r}; write one of "
            f"{', '.join(sorted(known))}."
        )
    expect_one_of("MODEL.NECK.NAME", node.NAME, "FPN", "PAFPN", "BiFPN", "ChannelMapper")
    expect_one_of("MODEL.TIMM.NORM", cfg.MODEL.TIMM.NORM, "", "FrozenBN", "SyncBN", "GN")
    if node.ROUNDS < 1:
        raise ConfigError(f"MODEL.NECK.ROUNDS is {node.ROUNDS}; write a number of at least 1.")
    if not 0 <= cfg.MODEL.TIMM.DROP_PATH < 1:
        raise ConfigError(
            f"MODEL.TIMM.DROP_PATH is {cfg.MODEL.TIMM.DROP_PATH}; write a rate from 0 to below 1."
        )
    if node.NAME != "FPN" and cfg.MODEL.BACKBONE.NAME == "build_resnet_fpn_backbone":
        raise ConfigError(
            f"MODEL.NECK.NAME is {node.NAME!r}, but MODEL.BACKBONE.NAME build_resnet_fpn_backbone "
            "always has Detectron2's FPN. Write MODEL.BACKBONE.NAME build_resnet_neck_backbone."
        )


def _check_sparse_rcnn(cfg: CfgNode) -> None:
    node = cfg.MODEL.SparseRCNN
    key = "MODEL.SparseRCNN"
    if node.NUM_CLASSES < 1:
        raise ConfigError(
            f"{key}.NUM_CLASSES is {node.NUM_CLASSES}. 0 takes the number from the training data, "
            "which are not known here; write the number of classes."
        )
    sizes = ("NUM_PROPOSALS", "NUM_HEADS", "NHEADS", "HIDDEN_DIM", "DIM_DYNAMIC", "DIM_FEEDFORWARD")
    for name in sizes:
        if node[name] < 1:
            raise ConfigError(f"{key}.{name} is {node[name]}; write a number of at least 1.")
    if node.NUM_DYNAMIC != 2:
        raise ConfigError(
            f"{key}.NUM_DYNAMIC is {node.NUM_DYNAMIC}; dynamic interaction is defined for two "
            f"generated convolutions. Write {key}.NUM_DYNAMIC 2."
        )
    if cfg.MODEL.FPN.OUT_CHANNELS != node.HIDDEN_DIM:
        raise ConfigError(
            f"MODEL.FPN.OUT_CHANNELS is {cfg.MODEL.FPN.OUT_CHANNELS}, but {key}.HIDDEN_DIM is "
            f"{node.HIDDEN_DIM}. RoI and proposal features need the same channels; write the same "
            "number for both."
        )
    if node.HIDDEN_DIM % node.NHEADS:
        raise ConfigError(
            f"{key}.HIDDEN_DIM {node.HIDDEN_DIM} is not a multiple of {key}.NHEADS {node.NHEADS}; "
            "choose NHEADS so that it divides HIDDEN_DIM."
        )
    expect_one_of(f"{key}.ACTIVATION", node.ACTIVATION, "relu", "gelu")
    for name in ("LOSS", "COST"):
        expect_one_of(f"{key}.OVERLAP.{name}", node.OVERLAP[name], *OVERLAPS)
    _check_label_assignment(node.DLA, f"{key}.DLA")
    modes = ("image", "center", "grid", "random")
    expect_one_of(f"{key}.PROPOSALS.BOXES", node.PROPOSALS.BOXES, *modes)
    _check_dynamic_proposals(node.DPG, f"{key}.DPG")
    _check_suppression(node.NMS, f"{key}.NMS")
    _check_recollection(node, f"{key}.SQR")


def _check_adamixer(cfg: CfgNode) -> None:
    node, key, channels = cfg.MODEL.AdaMixer, "MODEL.AdaMixer", cfg.MODEL.SparseRCNN.HIDDEN_DIM
    for name in ("GROUPS", "IN_POINTS", "OUT_POINTS"):
        if node[name] < 1:
            raise ConfigError(f"{key}.{name} is {node[name]}; write a number of at least 1.")
    is_used = cfg.MODEL.META_ARCHITECTURE in ("AdaMixer", "ASAG")
    if is_used and (channels % node.GROUPS or channels % 8):
        raise ConfigError(
            f"MODEL.SparseRCNN.HIDDEN_DIM is {channels}; AdaMixer needs a multiple of 8 and of "
            f"{key}.GROUPS {node.GROUPS}."
        )


def _check_generalized_rcnn(cfg: CfgNode) -> None:
    heads, node, key = cfg.MODEL.ROI_HEADS, cfg.MODEL.DYNAMIC_RCNN, "MODEL.DYNAMIC_RCNN"
    if heads.NUM_CLASSES < 1:
        raise ConfigError(
            f"MODEL.ROI_HEADS.NUM_CLASSES is {heads.NUM_CLASSES}. 0 takes the number from the "
            "training data, which are not known here; write the number of classes."
        )
    if heads.NAME != "DynamicROIHeads":
        return
    if len(heads.IOU_THRESHOLDS) != 1 or list(heads.IOU_LABELS) != [0, 1]:
        raise ConfigError(
            f"MODEL.ROI_HEADS has IOU_THRESHOLDS {list(heads.IOU_THRESHOLDS)} and IOU_LABELS "
            f"{list(heads.IOU_LABELS)}; DynamicROIHeads has one threshold. Write [0.5] and [0, 1]."
        )
    kind = cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE
    if node.BETA_ENABLED and kind != "smooth_l1":
        raise ConfigError(
            f"MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE is {kind!r}, which has no transition point. "
            f"Write smooth_l1, or {key}.BETA_ENABLED False."
        )
    expect_one_of(f"{key}.BETA_SOURCE", node.BETA_SOURCE, "sampled", "all")
    expect_one_of(f"{key}.IOU_RANK", node.IOU_RANK, "image", "batch")
    for name in ("KI", "KE", "ITERATION_COUNT"):
        if node[name] < 1:
            raise ConfigError(f"{key}.{name} is {node[name]}; write a number of at least 1.")
    for name in ("WARMUP_BETA", "EPS"):
        if not node[name] > 0:
            raise ConfigError(f"{key}.{name} is {node[name]}; write a number above 0.")
    if not 0 < node.WARMUP_IOU <= node.MAX_IOU <= 1:
        raise ConfigError(
            f"{key} has WARMUP_IOU {node.WARMUP_IOU} and MAX_IOU {node.MAX_IOU}; write IoUs above "
            "0 and at most 1, the first at most the second."
        )


def _check_label_assignment(node: CfgNode, key: str) -> None:
    expect_one_of(f"{key}.ROUNDING", node.ROUNDING, "floor", "round")
    expect_one_of(f"{key}.ORDER", node.ORDER, "step_then_cap", "cap_then_step")
    expect_one_of(f"{key}.DECISION", node.DECISION, "rescale", "topk", "exact")
    expect_one_of(f"{key}.NORMALIZER", node.NORMALIZER, "positives", "gt")
    for name, least in {"TOP_Q": 1, "ITERATIONS": 1, "STATIC_UNITS": 0, "UNIT_STEP": 0}.items():
        if node[name] < least:
            raise ConfigError(f"{key}.{name} is {node[name]}; write a number of at least {least}.")
    for name in ("REPAIR", "LOG_PERIOD"):
        if node[name] < 0:
            raise ConfigError(f"{key}.{name} is {node[name]}; write 0 for none, or a number above.")
    if node.MIN_UNITS not in (0, 1):
        raise ConfigError(f"{key}.MIN_UNITS is {node.MIN_UNITS}; write 0 or 1.")
    if not node.EPSILON > 0:
        raise ConfigError(f"{key}.EPSILON is {node.EPSILON}; write a number above 0, such as 0.1.")
    if not 0 < node.MAX_POSITIVE_FRACTION <= 1:
        raise ConfigError(
            f"{key}.MAX_POSITIVE_FRACTION is {node.MAX_POSITIVE_FRACTION}; write a part of the "
            "proposals, above 0 and at most 1, such as 0.8."
        )


def _check_dynamic_proposals(node: CfgNode, key: str) -> None:
    expect_one_of(f"{key}.REDUCE", node.REDUCE, "sum", "mean")
    expect_one_of(f"{key}.NORM", node.NORM, "none", "BN", "SyncBN", "FrozenBN", "GN")
    for name in ("NUM_EXPERTS", "RESIZE", "HIDDEN"):
        if node[name] < 1:
            raise ConfigError(f"{key}.{name} is {node[name]}; write a number of at least 1.")
    for name in ("TAU_ITERS", "BOX_JITTER", "TILING_NOISE", "LOG_PERIOD"):
        if node[name] is not None and node[name] < 0:
            raise ConfigError(f"{key}.{name} is {node[name]}; write 0 or a number above.")
    for name in ("TAU_START", "TAU_END"):
        if not node[name] > 0:
            raise ConfigError(f"{key}.{name} is {node[name]}; write a temperature above 0.")


def _check_suppression(node: CfgNode, key: str) -> None:
    if node.ENABLED not in (None, True, False):
        raise ConfigError(
            f"{key}.ENABLED is {node.ENABLED!r}; write True, False, or None for "
            "'on where the assignment is one-to-many'."
        )
    if not 0 <= node.THRESHOLD <= 1:
        raise ConfigError(f"{key}.THRESHOLD is {node.THRESHOLD}; write an IoU between 0 and 1.")


def _check_recollection(node: CfgNode, key: str) -> None:
    sqr = node.SQR
    expect_one_of(f"{key}.MODE", sqr.MODE, "selective", "dense")
    expect_one_of(f"{key}.REDUCTION", sqr.REDUCTION, "sum", "mean")
    for name in ("CHUNK", "LOG_PERIOD"):
        if sqr[name] < 0:
            raise ConfigError(f"{key}.{name} is {sqr[name]}; write 0 or a number above.")
    uses_start = sqr.ENABLED and sqr.MODE == "selective" and not sqr.WINDOWS
    if uses_start and not 1 <= sqr.START <= node.NUM_HEADS:
        raise ConfigError(
            f"{key}.START is {sqr.START}; write a stage from 1 to {node.NUM_HEADS}, the number of "
            "stages (MODEL.SparseRCNN.NUM_HEADS)."
        )
    if sqr.ENABLED and not node.DEEP_SUPERVISION:
        raise ConfigError(
            f"{key}.ENABLED is True, but MODEL.SparseRCNN.DEEP_SUPERVISION is False: without "
            "losses on every stage, proposals that are recollected would teach nothing. Write "
            "MODEL.SparseRCNN.DEEP_SUPERVISION True."
        )


def choose_device(cfg: CfgNode) -> None:
    """Fall back to the CPU, with a note, where the config asks for CUDA and there is none."""
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        _LOGGER.warning(
            "MODEL.DEVICE is %r, but torch finds no CUDA device: running on the CPU. "
            "Write MODEL.DEVICE cpu to silence this note.",
            cfg.MODEL.DEVICE,
        )
        cfg.MODEL.DEVICE = "cpu"
