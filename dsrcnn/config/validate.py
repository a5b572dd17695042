"""Checks of a config against itself, the registered components and the machine.

Most checks are rows of a table: a key and the values it takes. A message names the key, the value
found and what to write.
"""

import logging
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    ROI_HEADS_REGISTRY,
    GeneralizedRCNN,
)
from detectron2.utils.registry import Registry

from ..errors import ConfigError

_LOGGER = logging.getLogger(__name__)


class ChecksConfig:
    """Base of registered components that check the config keys they use."""

    @classmethod
    def check_config(cls, cfg: CfgNode) -> None:
        """Raise a `ConfigError` if `cfg` contradicts itself."""


class CheckedArchitecture(ChecksConfig):
    """Base of meta-architectures that declare and check their config.

    Attributes:
        num_classes_key: config key with the number of classes; 0 there takes the training data's.
    """

    num_classes_key: ClassVar[str] = "MODEL.SparseRCNN.NUM_CLASSES"


class Allowed(NamedTuple):
    """Values that a key takes, as a predicate and in words."""

    test: Callable[[Any], bool]
    words: str


def one_of(*values: object) -> Allowed:
    """Allow these values."""
    return Allowed(lambda v: v in values, f"one of {', '.join(map(str, values))}")


def at_least(least: float) -> Allowed:
    """Allow numbers from `least` on."""
    return Allowed(lambda v: v >= least, f"a number of at least {least:g}")


def above(limit: float, most: float = float("inf")) -> Allowed:
    """Allow numbers above `limit`, up to and including `most`."""
    end = "" if most == float("inf") else f", at most {most:g}"
    return Allowed(lambda v: limit < v <= most, f"a number above {limit:g}{end}")


FRACTION = Allowed(lambda v: 0 <= v <= 1, "a number from 0 to 1")
BELOW_ONE = Allowed(lambda v: 0 <= v < 1, "a number from 0 to below 1")
RANGE = Allowed(
    lambda v: len(v) == 2 and 0 < v[0] <= v[1], "the smallest and the largest factor, both above 0"
)

_SPARSE_RCNN = {
    **dict.fromkeys(
        ("NUM_PROPOSALS", "NUM_HEADS", "NHEADS", "HIDDEN_DIM", "DIM_DYNAMIC", "DIM_FEEDFORWARD"),
        at_least(1),
    ),
    "NUM_DYNAMIC": one_of(2),
    "ACTIVATION": one_of("relu", "gelu"),
    "OVERLAP": one_of("iou", "giou", "diou", "ciou"),
    "PROPOSALS.BOXES": one_of("image", "center", "grid", "random"),
    "NMS.ENABLED": Allowed(lambda v: v in (None, True, False), "True, False or None"),
    "NMS.THRESHOLD": FRACTION,
    "DLA.NORMALIZER": one_of("positives", "gt"),
    **dict.fromkeys(("DLA.TOP_Q", "DLA.ITERATIONS"), at_least(1)),
    **dict.fromkeys(("DLA.STATIC_UNITS", "DLA.UNIT_STEP"), at_least(0)),
    "DLA.EPSILON": above(0),
    "DLA.MAX_POSITIVE_FRACTION": above(0, 1),
    "DPG.NORM": one_of("none", "BN", "SyncBN", "FrozenBN", "GN"),
    **dict.fromkeys(("DPG.NUM_EXPERTS", "DPG.RESIZE", "DPG.HIDDEN"), at_least(1)),
    **dict.fromkeys(("DPG.BOX_JITTER", "DPG.TILING_NOISE"), at_least(0)),
    "DPG.TAU_ITERS": Allowed(lambda v: v is None or v >= 0, "None or a number of at least 0"),
    **dict.fromkeys(("DPG.TAU_START", "DPG.TAU_END"), above(0)),
    "SQR.MODE": one_of("selective", "dense"),
    "SQR.CHUNK": at_least(0),
}
_ADAMIXER = dict.fromkeys(("IN_POINTS", "OUT_POINTS"), at_least(1))
_ASAG = {
    "DECODER": one_of("AdaMixer", "SparseRCNN"),
    "NUM_DECODERS": at_least(1),
    "GUIDED_PART": BELOW_ONE,
    "DN.NUM": at_least(1),
    "ANCHORS.INFERENCE_LEVEL": one_of("P3P6", "P4P6", "P5P6"),
    **{f"ANCHORS.{k}": at_least(1) for k in ("FIXED", "PROBED", "HIDDEN", "MIN")},
    "ANCHORS.MAX_PATCHES": at_least(0),
    **dict.fromkeys(("ANCHORS.LOW", "ANCHORS.HIGH", "ANCHORS.OUTPUT"), FRACTION),
}
# Keys of cascades with a fixed value in ASAG.
_FIXED_IN_ASAG = {
    "MODEL.SparseRCNN.DLA.ENABLED": False,
    "MODEL.SparseRCNN.DPG.ENABLED": False,
    "MODEL.SparseRCNN.SQR.ENABLED": False,
    "MODEL.SparseRCNN.OVERLAP": "giou",
    "MODEL.SparseRCNN.DEEP_SUPERVISION": True,
    "MODEL.SparseRCNN.DROPOUT": 0.0,
    "MODEL.SparseRCNN.ACTIVATION": "gelu",
    "MODEL.SparseRCNN.USE_FOCAL": True,
    "MODEL.COMPILE": False,
}
_DYNAMIC_RCNN = {
    **dict.fromkeys(("KI", "KE", "ITERATION_COUNT"), at_least(1)),
    "WARMUP_BETA": above(0),
    **dict.fromkeys(("WARMUP_IOU", "MAX_IOU"), above(0, 1)),
}
_BACKBONE = {
    "NECK.NAME": one_of("FPN", "PAFPN", "BiFPN", "ChannelMapper"),
    "TIMM.NORM": one_of("", "FrozenBN", "SyncBN", "GN"),
    "TIMM.DROP_PATH": BELOW_ONE,
}
_TRAINING = {
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": one_of("full_model", "norm", "value"),
    "SOLVER.OPTIMIZER": one_of("ADAMW", "SGD"),
    "SOLVER.AMP.PRECISION": one_of("bf16", "fp16"),
    "SOLVER.LR_SCHEDULER_NAME": one_of(
        "WarmupMultiStepLR", "WarmupCosineLR", "WarmupCosineRestartsLR"
    ),
    **dict.fromkeys(("SOLVER.LAYER_DECAY", "MODEL.EMA.DECAY"), above(0, 1)),
    **dict.fromkeys(("SOLVER.ACCUMULATE", "SOLVER.IMS_PER_BATCH"), at_least(1)),
    **{f"SOLVER.EPOCHS.{k}": at_least(0) for k in ("MAX", "WARMUP", "CHECKPOINT", "EVAL")},
    **dict.fromkeys(("SOLVER.REFERENCE_BATCH", "TEST.BEST.PATIENCE"), at_least(0)),
    **dict.fromkeys(("LOG.IMAGES", "LOG.PERIOD"), at_least(0)),
    "LOG.LEVEL": one_of("normal", "verbose"),
}
_AUGMENTATION = {
    "RANDOM_FLIP": one_of("none", "horizontal", "vertical"),
    "PAD_TO": at_least(0),
    **{f"AUG.{k}": FRACTION for k in ("VERTICAL_FLIP", "MIN_VISIBLE", "PLAIN_END")},
    **{
        f"AUG.{k}.PROB": FRACTION
        for k in ("HSV", "BLUR", "NOISE", "WARP", "MOSAIC", "MIXUP", "COPY_PASTE")
    },
    "AUG.WARP.PERSPECTIVE": Allowed(lambda v: 0 <= v < 0.5, "a number from 0 to below 0.5"),
    "AUG.WARP.SCALE": RANGE,
    "AUG.MOSAIC.SIZE": at_least(32),
    "AUG.SCALE_JITTER.SIZE": Allowed(lambda v: v == 0 or v >= 32, "0, or a number of at least 32"),
}


def check_config(cfg: CfgNode) -> None:
    """Reject configs that would fail later and less clearly.

    Raises:
        ConfigError: naming the key, the value found and the values expected.
    """
    check_model(cfg)
    _check_augmentation(cfg)
    _check_training(cfg)


def check_model(cfg: CfgNode) -> None:
    """Run the part of `check_config` that building a model needs.

    Raises:
        ConfigError: naming the key, the value found and the values expected.
    """
    architecture = architecture_of(cfg)
    if issubclass(architecture, CheckedArchitecture):
        architecture.check_config(cfg)
    if issubclass(architecture, GeneralizedRCNN):
        _check_generalized_rcnn(cfg)
    _check_backbone(cfg)


def architecture_of(cfg: CfgNode) -> type:
    """Return the registered class of ``MODEL.META_ARCHITECTURE``.

    Raises:
        ConfigError: if no such class is registered.
    """
    check_name("MODEL.META_ARCHITECTURE", cfg.MODEL.META_ARCHITECTURE, META_ARCH_REGISTRY)
    architecture: type = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    return architecture


def num_classes_key(cfg: CfgNode) -> str | None:
    """Return the key with the architecture's number of classes, None if it is not known."""
    architecture = architecture_of(cfg)
    if issubclass(architecture, CheckedArchitecture):
        return architecture.num_classes_key
    return "MODEL.ROI_HEADS.NUM_CLASSES" if issubclass(architecture, GeneralizedRCNN) else None


def choose_device(cfg: CfgNode) -> None:
    """Fall back to the CPU, with a note, if the config asks for CUDA and there is none."""
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        _LOGGER.warning(
            "MODEL.DEVICE is %r, but torch finds no CUDA device: running on the CPU. "
            "Write MODEL.DEVICE cpu to silence this note.",
            cfg.MODEL.DEVICE,
        )
        cfg.MODEL.DEVICE = "cpu"


def check_name(key: str, name: str, registry: Registry) -> None:
    """Raise a `ConfigError` if `name`, the value of `key`, is not in a registry."""
    if name not in registry:
        known = ", ".join(sorted(member for member, _ in registry))
        raise ConfigError(f"{key} is {name!r}; write one of {known}.")


def check_sparse_rcnn(cfg: CfgNode) -> None:
    """Check ``MODEL.SparseRCNN`` as all sparse detectors use it."""
    node, key = cfg.MODEL.SparseRCNN, "MODEL.SparseRCNN"
    _check_num_classes(f"{key}.NUM_CLASSES", node.NUM_CLASSES)
    _check_table(cfg, _SPARSE_RCNN, key)
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
    for part in cfg.MODEL.ACTIVATION_CHECKPOINT:
        _check("MODEL.ACTIVATION_CHECKPOINT", part, one_of("backbone", "stages"))


def check_cascade(cfg: CfgNode) -> None:
    """Check what only a cascade of stages uses."""
    node, sqr, key = cfg.MODEL.SparseRCNN, cfg.MODEL.SparseRCNN.SQR, "MODEL.SparseRCNN"
    if sqr.ENABLED and sqr.MODE == "selective" and not 1 <= sqr.START <= node.NUM_HEADS:
        raise ConfigError(
            f"{key}.SQR.START is {sqr.START}; write the number of plain stages, from 1 to "
            f"{node.NUM_HEADS} ({key}.NUM_HEADS)."
        )
    if sqr.ENABLED and not node.DEEP_SUPERVISION:
        raise ConfigError(
            f"{key}.SQR.ENABLED is True, but {key}.DEEP_SUPERVISION is False: without losses on "
            "every stage, recollection before the last stage would have no effect. Write "
            f"{key}.DEEP_SUPERVISION True."
        )


def check_adamixer(cfg: CfgNode) -> None:
    """Check ``MODEL.AdaMixer``."""
    _check_table(cfg, _ADAMIXER, "MODEL.AdaMixer")
    channels = cfg.MODEL.SparseRCNN.HIDDEN_DIM
    if channels % 8:
        raise ConfigError(
            f"MODEL.SparseRCNN.HIDDEN_DIM is {channels}; AdaMixer needs a multiple of 8."
        )


def check_asag(cfg: CfgNode) -> None:
    """Check ``MODEL.ASAG``, and that no part of a cascade is enabled."""
    for key, fixed in _FIXED_IN_ASAG.items():
        if (value := _value(cfg, key)) != fixed:
            raise ConfigError(
                f"{key} is {value!r}, but ASAG has no cascade of stages and always uses "
                f"{fixed!r}. Write {key} {fixed}."
            )
    if "stages" in cfg.MODEL.ACTIVATION_CHECKPOINT:
        raise ConfigError(
            f"MODEL.ACTIVATION_CHECKPOINT is {tuple(cfg.MODEL.ACTIVATION_CHECKPOINT)}, but ASAG "
            "has no stages. Leave out 'stages'."
        )
    _check_table(cfg, _ASAG, "MODEL.ASAG")
    node, anchors, key = cfg.MODEL.ASAG, cfg.MODEL.ASAG.ANCHORS, "MODEL.ASAG"
    if not -node.NUM_DECODERS <= node.USED_HEAD < node.NUM_DECODERS:
        raise ConfigError(
            f"{key}.USED_HEAD is {node.USED_HEAD}; write a decoder from 0 to "
            f"{node.NUM_DECODERS - 1}, or -1 for the last."
        )
    if anchors.MAX < anchors.MIN:
        raise ConfigError(
            f"{key}.ANCHORS.MAX is {anchors.MAX}; write at least {key}.ANCHORS.MIN, {anchors.MIN}."
        )
    if anchors.LOW >= anchors.HIGH:
        raise ConfigError(
            f"{key}.ANCHORS has LOW {anchors.LOW} and HIGH {anchors.HIGH}; write LOW below HIGH."
        )


def check_dynamic_rcnn(cfg: CfgNode) -> None:
    """Check ``MODEL.DYNAMIC_RCNN`` and the keys of Detectron2's heads that it replaces."""
    heads, node, key = cfg.MODEL.ROI_HEADS, cfg.MODEL.DYNAMIC_RCNN, "MODEL.DYNAMIC_RCNN"
    if len(heads.IOU_THRESHOLDS) != 1 or list(heads.IOU_LABELS) != [0, 1]:
        raise ConfigError(
            f"MODEL.ROI_HEADS has IOU_THRESHOLDS {list(heads.IOU_THRESHOLDS)} and IOU_LABELS "
            f"{list(heads.IOU_LABELS)}; {heads.NAME} has one threshold. Write [0.5] and [0, 1]."
        )
    kind = cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE
    if node.BETA_ENABLED and kind != "smooth_l1":
        raise ConfigError(
            f"MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE is {kind!r}, which has no transition point. "
            f"Write smooth_l1, or {key}.BETA_ENABLED False."
        )
    _check_table(cfg, _DYNAMIC_RCNN, key)
    if node.WARMUP_IOU > node.MAX_IOU:
        raise ConfigError(
            f"{key} has WARMUP_IOU {node.WARMUP_IOU} and MAX_IOU {node.MAX_IOU}; write a "
            "WARMUP_IOU of at most MAX_IOU."
        )


def _check_generalized_rcnn(cfg: CfgNode) -> None:
    _check_num_classes("MODEL.ROI_HEADS.NUM_CLASSES", cfg.MODEL.ROI_HEADS.NUM_CLASSES)
    check_name("MODEL.ROI_HEADS.NAME", cfg.MODEL.ROI_HEADS.NAME, ROI_HEADS_REGISTRY)
    heads = ROI_HEADS_REGISTRY.get(cfg.MODEL.ROI_HEADS.NAME)
    if issubclass(heads, ChecksConfig):
        heads.check_config(cfg)


def _check_backbone(cfg: CfgNode) -> None:
    check_name("MODEL.BACKBONE.NAME", cfg.MODEL.BACKBONE.NAME, BACKBONE_REGISTRY)
    _check_table(cfg, _BACKBONE, "MODEL")
    if cfg.MODEL.NECK.NAME != "FPN" and cfg.MODEL.BACKBONE.NAME == "build_resnet_fpn_backbone":
        raise ConfigError(
            f"MODEL.NECK.NAME is {cfg.MODEL.NECK.NAME!r}, but MODEL.BACKBONE.NAME "
            "build_resnet_fpn_backbone always has Detectron2's FPN. Write MODEL.BACKBONE.NAME "
            "build_resnet_neck_backbone."
        )


def _check_training(cfg: CfgNode) -> None:
    _check_table(cfg, _TRAINING)
    for name in cfg.SOLVER.NO_DECAY:
        _check("SOLVER.NO_DECAY", name, one_of("norm", "bias", "embedding"))
    if cfg.SOLVER.EPOCHS.MAX == 0 and any(cfg.SOLVER.EPOCHS.values()):
        raise ConfigError(
            "SOLVER.EPOCHS.MAX is 0, so the other keys of SOLVER.EPOCHS have no effect. Write the "
            "number of epochs to train."
        )
    best = cfg.TEST.BEST
    if "validation/" in best.METRIC and not cfg.TEST.LOSS:
        raise ConfigError(
            f"TEST.BEST.METRIC is {best.METRIC!r}, but TEST.LOSS is False, so there are no losses "
            "on test data. Write TEST.LOSS True."
        )
    if best.PATIENCE and not best.METRIC:
        raise ConfigError(
            "TEST.BEST.PATIENCE ends training by TEST.BEST.METRIC, which is empty. Write a metric, "
            "such as bbox/AP, or TEST.BEST.PATIENCE 0."
        )


def _check_augmentation(cfg: CfgNode) -> None:
    _check_table(cfg, _AUGMENTATION, "INPUT")
    node = cfg.INPUT.AUG
    without_masks = [k for k in ("MOSAIC", "MIXUP", "COPY_PASTE") if node[k].PROB]
    without_masks += ["ALBUMENTATIONS"] if node.ALBUMENTATIONS else []
    if cfg.MODEL.MASK_ON and without_masks:
        raise ConfigError(
            f"INPUT.AUG.{without_masks[0]} transforms boxes but no masks, and MODEL.MASK_ON is "
            "True. Turn it off, or write MODEL.MASK_ON False."
        )


def _check_num_classes(key: str, value: int) -> None:
    if value < 1:
        raise ConfigError(
            f"{key} is {value}. 0 takes the number from the classes of the training set, which are "
            "not known here: write the number of classes, or load the config by dsrcnn.load_cfg."
        )


def _check_table(cfg: CfgNode, table: dict[str, Allowed], prefix: str = "") -> None:
    for name, allowed in table.items():
        key = f"{prefix}.{name}" if prefix else name
        _check(key, _value(cfg, key), allowed)


def _check(key: str, value: Any, allowed: Allowed) -> None:
    if not allowed.test(value):
        shown = (
            tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else value
        )
        raise ConfigError(f"{key} is {shown!r}; write {allowed.words}.")


def _value(cfg: CfgNode, key: str) -> Any:
    node: Any = cfg
    for part in key.split("."):
        node = node[part]
    return node
