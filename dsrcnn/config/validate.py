"""Checks of a config against itself and the machine; an error says what to write."""

import logging

import torch
from detectron2.config import CfgNode
from detectron2.modeling import BACKBONE_REGISTRY

from ..errors import ConfigError
from ..structures import OVERLAPS

__all__ = [
    "CASCADES",
    "SPARSE_DETECTORS",
    "check_asag",
    "check_augmentation",
    "check_config",
    "check_model",
    "check_training",
    "choose_device",
    "expect_one_of",
]


def check_training(cfg: CfgNode) -> None:
    """Reject values of ``SOLVER``, ``MODEL.EMA``, ``TEST`` and ``LOG`` that cannot work.

    Raises:
        ConfigError: naming key, value found and value expected.
    """
    solver, clip = cfg.SOLVER, cfg.SOLVER.CLIP_GRADIENTS
    expect_one_of("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", clip.CLIP_TYPE, "full_model", "norm", "value")
    expect_one_of("SOLVER.OPTIMIZER", solver.OPTIMIZER, "ADAMW", "SGD")
    expect_one_of("SOLVER.AMP.PRECISION", solver.AMP.PRECISION, "bf16", "fp16")
    schedules = ("WarmupMultiStepLR", "WarmupCosineLR", "WarmupCosineRestartsLR")
    expect_one_of("SOLVER.LR_SCHEDULER_NAME", solver.LR_SCHEDULER_NAME, *schedules)
    for name in solver.NO_DECAY:
        expect_one_of("SOLVER.NO_DECAY", name, "norm", "bias", "embedding")
    _expect_between("SOLVER.LAYER_DECAY", solver.LAYER_DECAY, 0.0, 1.0)
    _expect_between("MODEL.EMA.DECAY", cfg.MODEL.EMA.DECAY, 0.0, 1.0)
    expect_one_of("TEST.BEST.MODE", cfg.TEST.BEST.MODE, "max", "min")
    for key, value, least in (
        ("SOLVER.ACCUMULATE", solver.ACCUMULATE, 1),
        ("SOLVER.IMS_PER_BATCH", solver.IMS_PER_BATCH, 1),
        ("SOLVER.REFERENCE_BATCH", solver.REFERENCE_BATCH, 0),
        ("TEST.BEST.PATIENCE", cfg.TEST.BEST.PATIENCE, 0),
        ("LOG.IMAGES", cfg.LOG.IMAGES, 0),
        *((f"SOLVER.EPOCHS.{name}", solver.EPOCHS[name], 0) for name in _EPOCHS),
    ):
        if value < least:
            raise ConfigError(f"{key} is {value}; write a number of at least {least}.")
    if solver.EPOCHS.MAX == 0 and any(solver.EPOCHS.values()):
        raise ConfigError(
            "SOLVER.EPOCHS.MAX is 0, so the other keys of SOLVER.EPOCHS mean nothing. Write how "
            "many epochs to train."
        )
    _check_best_model(cfg)


def _check_best_model(cfg: CfgNode) -> None:
    best = cfg.TEST.BEST
    if "validation/" in best.METRIC:
        if not cfg.TEST.LOSS:
            raise ConfigError(
                f"TEST.BEST.METRIC is {best.METRIC!r}, but TEST.LOSS is False, so there are no "
                "losses on test data. Write TEST.LOSS True."
            )
        if best.MODE == "max":
            raise ConfigError(
                f"TEST.BEST.METRIC is {best.METRIC!r}, a loss, but TEST.BEST.MODE is 'max', which "
                "would keep the worst model. Write TEST.BEST.MODE min."
            )
    if cfg.TEST.BEST.PATIENCE and not cfg.TEST.BEST.METRIC:
        raise ConfigError(
            "TEST.BEST.PATIENCE ends training by TEST.BEST.METRIC, which is empty. Write a metric, "
            "such as bbox/AP, or TEST.BEST.PATIENCE 0."
        )


_EPOCHS = ("MAX", "WARMUP", "CHECKPOINT", "EVAL")


def expect_one_of(key: str, found: str, *allowed: str) -> None:
    """Raise a `ConfigError` if `found` is not among the values a key knows."""
    if found not in allowed:
        raise ConfigError(f"{key} is {found!r}; write one of {', '.join(allowed)}.")


def _expect_between(key: str, found: float, least: float, most: float) -> None:
    if not least < found <= most:
        raise ConfigError(f"{key} is {found}; write a number above {least:g}, at most {most:g}.")


def check_asag(cfg: CfgNode) -> None:
    """Check `MODEL.ASAG`, and that no part of a cascade is asked for.

    Raises:
        ConfigError: naming key, value found and value expected.
    """
    node, shared, key = cfg.MODEL.ASAG, cfg.MODEL.SparseRCNN, "MODEL.ASAG"
    for part in ("DLA", "DPG", "SQR"):
        if shared[part].ENABLED:
            raise ConfigError(
                f"MODEL.SparseRCNN.{part}.ENABLED is True, but ASAG has no cascade of stages, and "
                f"its own proposals and matching. Write MODEL.SparseRCNN.{part}.ENABLED False."
            )
    for name, asked in (
        ("CHECKPOINT.STAGES", cfg.MODEL.CHECKPOINT.STAGES),
        ("COMPILE", cfg.MODEL.COMPILE),
    ):
        if asked:
            raise ConfigError(
                f"MODEL.{name} is True, but it is for the stages of a cascade, and ASAG has none. "
                f"Write MODEL.{name} False."
            )
    _check_shared(shared)
    if not shared.USE_FOCAL:
        raise ConfigError(
            "MODEL.SparseRCNN.USE_FOCAL is False, but ASAG's losses are for sigmoid scores. Write "
            "MODEL.SparseRCNN.USE_FOCAL True."
        )
    expect_one_of(f"{key}.DECODER", node.DECODER, "AdaMixer", "SparseRCNN")
    if node.NUM_DECODERS < 1:
        raise ConfigError(f"{key}.NUM_DECODERS is {node.NUM_DECODERS}; write at least 1.")
    if not -node.NUM_DECODERS <= node.USED_HEAD < node.NUM_DECODERS:
        raise ConfigError(
            f"{key}.USED_HEAD is {node.USED_HEAD}; write a decoder from 0 to "
            f"{node.NUM_DECODERS - 1}, or -1 for the last."
        )
    if node.SMALL_OBJECT_WEIGHT < 1:
        raise ConfigError(
            f"{key}.SMALL_OBJECT_WEIGHT is {node.SMALL_OBJECT_WEIGHT}; write at least 1."
        )
    for name in ("TRAIN_PATCHES", "LOG_PERIOD"):
        if node[name] < 0:
            raise ConfigError(f"{key}.{name} is {node[name]}; write 0 or a number above.")
    if not 0 <= node.GUIDED_PART < 1:
        raise ConfigError(
            f"{key}.GUIDED_PART is {node.GUIDED_PART}; write a part of the training, from 0 to "
            "below 1: one epoch of it."
        )
    if node.DN.NUM < 1 or node.DN.NOISE < 0:
        raise ConfigError(
            f"{key}.DN has NUM {node.DN.NUM} and NOISE {node.DN.NOISE}; write a number of queries "
            "of at least 1 and a noise that is not negative."
        )
    _check_anchors(node.ANCHORS, f"{key}.ANCHORS")


def _check_shared(node: CfgNode) -> None:
    """Keys of cascades that would do nothing here."""
    fixed = {
        "OVERLAP.LOSS": (node.OVERLAP.LOSS, "giou"),
        "OVERLAP.COST": (node.OVERLAP.COST, "giou"),
        "DEEP_SUPERVISION": (node.DEEP_SUPERVISION, True),
        "DROPOUT": (node.DROPOUT, 0.0),
        "ACTIVATION": (node.ACTIVATION, "gelu"),
    }
    for name, (found, needed) in fixed.items():
        if found != needed:
            raise ConfigError(
                f"MODEL.SparseRCNN.{name} is {found!r}, but ASAG always has {needed!r}. Write "
                f"MODEL.SparseRCNN.{name} {needed}."
            )


def _check_anchors(node: CfgNode, key: str) -> None:
    expect_one_of(f"{key}.INFERENCE_LEVEL", node.INFERENCE_LEVEL, "P3P6", "P4P6", "P5P6")
    for name in ("FIXED", "PROBED", "CELLS", "COMPRESSED", "HIDDEN", "MIN", "MIN_CHOSEN"):
        if node[name] < 1:
            raise ConfigError(f"{key}.{name} is {node[name]}; write a number of at least 1.")
    if node.MAX_PATCHES < 0:
        raise ConfigError(f"{key}.MAX_PATCHES is {node.MAX_PATCHES}; write 0 or a number above.")
    if node.MAX < node.MIN:
        raise ConfigError(f"{key}.MAX is {node.MAX}; write at least {key}.MIN, {node.MIN}.")
    if not 0 <= node.LOW < node.HIGH <= 1:
        raise ConfigError(
            f"{key} has LOW {node.LOW} and HIGH {node.HIGH}; write scores from 0 to 1, the first "
            "below the second."
        )
    for name in ("OVERLAP", "OUTPUT"):
        if not 0 <= node[name] <= 1:
            raise ConfigError(f"{key}.{name} is {node[name]}; write a number from 0 to 1.")


def check_augmentation(cfg: CfgNode) -> None:
    """Reject values of ``INPUT.AUG`` that cannot work.

    Raises:
        ConfigError: naming key, value found and value expected.
    """
    node = cfg.INPUT.AUG
    shares = {name: node[name] for name in ("VERTICAL_FLIP", "MIN_VISIBLE", "PLAIN_END")}
    shares["COPY_PASTE.MAX_COVERED"] = node.COPY_PASTE.MAX_COVERED
    parts = {name: part for name, part in node.items() if isinstance(part, CfgNode)}
    shares |= {f"{name}.PROB": part.PROB for name, part in parts.items() if "PROB" in part}
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise ConfigError(f"INPUT.AUG.{name} is {value}; write a number from 0 to 1.")
    if node.BLUR.MAX_SIZE < 3:
        raise ConfigError(f"INPUT.AUG.BLUR.MAX_SIZE is {node.BLUR.MAX_SIZE}; write 3 or more.")
    expect_one_of("INPUT.RANDOM_FLIP", cfg.INPUT.RANDOM_FLIP, "none", "horizontal", "vertical")
    for name, value, least in (
        ("PAD_TO", cfg.INPUT.PAD_TO, 0),
        ("AUG.MOSAIC.SIZE", node.MOSAIC.SIZE, 32),
        ("AUG.SCALE_JITTER.SIZE", node.SCALE_JITTER.SIZE, 32),
        ("AUG.COPY_PASTE.OBJECTS", node.COPY_PASTE.OBJECTS, 1),
        ("AUG.NOISE.MAX_SIGMA", node.NOISE.MAX_SIGMA, 1),
    ):
        if value < least:
            raise ConfigError(f"INPUT.{name} is {value}; write a number of at least {least}.")
    combining = [k for k in ("MOSAIC", "MIXUP", "COPY_PASTE") if node[k].PROB]
    combining += ["ALBUMENTATIONS"] if node.ALBUMENTATIONS else []
    if cfg.MODEL.MASK_ON and combining:
        raise ConfigError(
            f"INPUT.AUG.{combining[0]} moves boxes but no masks, and MODEL.MASK_ON is True. Leave "
            "it out, or write MODEL.MASK_ON False."
        )
    if not node.MIXUP.ALPHA > 0:
        raise ConfigError(f"INPUT.AUG.MIXUP.ALPHA is {node.MIXUP.ALPHA}; write a number above 0.")
    if not 0 <= node.WARP.PERSPECTIVE < 0.5:
        raise ConfigError(
            f"INPUT.AUG.WARP.PERSPECTIVE is {node.WARP.PERSPECTIVE}; write a share from 0 to below "
            "0.5."
        )
    if len(node.HSV.STRENGTHS) != 3:
        raise ConfigError(
            f"INPUT.AUG.HSV.STRENGTHS has {len(node.HSV.STRENGTHS)} numbers; write one each for "
            "hue, saturation and value."
        )
    for name, pair in (
        ("WARP.SCALE", node.WARP.SCALE),
        ("MOSAIC.SCALE", node.MOSAIC.SCALE),
        ("SCALE_JITTER.RANGE", node.SCALE_JITTER.RANGE),
    ):
        if len(pair) != 2 or not 0 < pair[0] <= pair[1]:
            raise ConfigError(
                f"INPUT.AUG.{name} is {tuple(pair)}; write the smallest and the largest factor, "
                "both above 0."
            )


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
