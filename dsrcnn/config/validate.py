"""Checks of a config against itself, the registered components and the machine.

Rules of single keys are the tables of `dsrcnn.config.rules`; here is what depends on several keys.
A message names the key, the value found and what to write.
"""

import logging
import re
from importlib.util import find_spec
from itertools import pairwise, product
from typing import Any, ClassVar

import torch
from detectron2.config import CfgNode
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_HEADS_REGISTRY,
    GeneralizedRCNN,
    StandardROIHeads,
)
from detectron2.modeling.anchor_generator import ANCHOR_GENERATOR_REGISTRY
from detectron2.modeling.proposal_generator import RPN_HEAD_REGISTRY
from detectron2.modeling.roi_heads import ROI_BOX_HEAD_REGISTRY
from detectron2.utils.registry import Registry

from ..errors import ConfigError
from . import rules
from .backbones import check_backbone
from .rules import check_table, check_types, check_value, one_of

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


def check_config(cfg: CfgNode) -> None:
    """Reject configs that would fail later and less clearly.

    Raises:
        ConfigError: naming the key, the value found and the values expected.
    """
    check_types(cfg)
    check_table(cfg, rules.RUN)
    check_model(cfg)
    _check_input(cfg)
    _check_training(cfg)
    _check_evaluation(cfg)


def _check_evaluation(cfg: CfgNode) -> None:
    most, made = cfg.TEST.MAX_DETECTIONS, cfg.TEST.DETECTIONS_PER_IMAGE
    if most > 100 and made < most:  # 100 is the default of both
        raise ConfigError(
            f"TEST.MAX_DETECTIONS is {most}, but the model makes {made} detections per image "
            f"(TEST.DETECTIONS_PER_IMAGE). Write TEST.DETECTIONS_PER_IMAGE {most}, too."
        )


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
    check_name("MODEL.BACKBONE.NAME", cfg.MODEL.BACKBONE.NAME, BACKBONE_REGISTRY)
    check_backbone(cfg, has_rpn=issubclass(architecture, GeneralizedRCNN))


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
    """Fall back to the CPU, with a note, if the config asks for CUDA and there is none.

    Raises:
        ConfigError: if torch does not find the device.
    """
    check_table(cfg, rules.RUN)
    name = cfg.MODEL.DEVICE
    device, count = torch.device(name), torch.cuda.device_count()
    if device.type != "cuda":
        try:
            torch.empty(1, device=device).tolist()  # "meta" has no values
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(
                f"MODEL.DEVICE is {name!r}, which torch does not find here; write cpu or cuda."
            ) from error
    elif torch.cuda.is_available():
        if device.index is not None and device.index >= count:
            raise ConfigError(
                f"MODEL.DEVICE is {name!r}, but torch finds {count} CUDA devices; the last is "
                f"cuda:{count - 1}."
            )
    else:
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
    check_table(cfg, rules.SPARSE_RCNN, key)
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
    _check_levels(cfg)
    for part in cfg.MODEL.ACTIVATION_CHECKPOINT:
        check_value("MODEL.ACTIVATION_CHECKPOINT", part, one_of("backbone", "stages"))
    if cfg.MODEL.MASK_ON:
        raise ConfigError(
            f"MODEL.MASK_ON is True, but {cfg.MODEL.META_ARCHITECTURE} predicts boxes only. Write "
            "MODEL.MASK_ON False."
        )
    if not any((node.CLASS_WEIGHT, node.GIOU_WEIGHT, node.L1_WEIGHT)):
        raise ConfigError(
            f"{key} has CLASS_WEIGHT, GIOU_WEIGHT and L1_WEIGHT 0, so nothing would be learned. "
            "Write at least one above 0."
        )


def _check_levels(cfg: CfgNode) -> None:
    """Check that levels named ``pN`` follow each other: boxes are assigned to them by size."""
    key, names = "MODEL.ROI_HEADS.IN_FEATURES", list(cfg.MODEL.ROI_HEADS.IN_FEATURES)
    numbers = [int(name[1:]) for name in names if re.fullmatch(r"p\d+", name)]
    if len(numbers) == len(names) and any(b - a != 1 for a, b in pairwise(numbers)):
        levels = [f"p{number}" for number in range(min(numbers), max(numbers) + 1)]
        raise ConfigError(
            f"{key} is {tuple(names)}; levels must follow each other, finest first. Write {key} "
            f'"{levels}".'
        )


def check_cascade(cfg: CfgNode) -> None:
    """Check what only a cascade of stages uses."""
    node, sqr, key = cfg.MODEL.SparseRCNN, cfg.MODEL.SparseRCNN.SQR, "MODEL.SparseRCNN"
    if sqr.ENABLED and sqr.MODE == "selective" and not 1 <= sqr.START <= node.NUM_HEADS:
        raise ConfigError(
            f"{key}.SQR.START is {sqr.START}; write the number of plain stages, from 1 to "
            f"{node.NUM_HEADS} ({key}.NUM_HEADS)."
        )
    used = node.INFERENCE_STAGES
    if used > node.NUM_HEADS or (0 < used < node.NUM_HEADS and not node.DEEP_SUPERVISION):
        allowed = f"0 to {node.NUM_HEADS}" if node.DEEP_SUPERVISION else f"0 or {node.NUM_HEADS}"
        raise ConfigError(
            f"{key}.INFERENCE_STAGES is {used}; write {allowed}: a stage that predicts needs a "
            f"loss ({key}.NUM_HEADS {node.NUM_HEADS}, DEEP_SUPERVISION {node.DEEP_SUPERVISION})."
        )
    if sqr.ENABLED and not node.DEEP_SUPERVISION:
        raise ConfigError(
            f"{key}.SQR.ENABLED is True, but {key}.DEEP_SUPERVISION is False: without losses on "
            "every stage, recollection before the last stage would have no effect. Write "
            f"{key}.DEEP_SUPERVISION True."
        )


def check_adamixer(cfg: CfgNode) -> None:
    """Check ``MODEL.AdaMixer``."""
    check_table(cfg, rules.ADAMIXER, "MODEL.AdaMixer")
    channels = cfg.MODEL.SparseRCNN.HIDDEN_DIM
    if channels % 8:
        message = f"MODEL.SparseRCNN.HIDDEN_DIM is {channels}; AdaMixer needs a multiple of 8."
        raise ConfigError(message)


def check_unused(cfg: CfgNode, defaults: dict[str, Any]) -> None:
    """Raise a `ConfigError` if a key without effect has another value than its default."""
    for key, default in defaults.items():
        value = rules.value_of(cfg, key)
        value = tuple(value) if isinstance(value, (list, tuple)) else value
        if value != default:
            raise ConfigError(
                f"{key} is {value!r}, which has no effect in {cfg.MODEL.META_ARCHITECTURE}. Write "
                f"its default, {key} {rules.shown(default)}."
            )


def check_asag(cfg: CfgNode) -> None:
    """Check ``MODEL.ASAG``, and that no part of a cascade is enabled."""
    for key, fixed in rules.FIXED_IN_ASAG.items():
        if (value := rules.value_of(cfg, key)) != fixed:
            raise ConfigError(
                f"{key} is {value!r}, but ASAG has no cascade of stages and always uses "
                f"{fixed!r}. Write {key} {rules.shown(fixed)}."
            )
    if "stages" in cfg.MODEL.ACTIVATION_CHECKPOINT:
        raise ConfigError(
            f"MODEL.ACTIVATION_CHECKPOINT is {tuple(cfg.MODEL.ACTIVATION_CHECKPOINT)}, but ASAG "
            "has no stages. Leave out 'stages'."
        )
    check_table(cfg, rules.ASAG, "MODEL.ASAG")
    node, anchors, key = cfg.MODEL.ASAG, cfg.MODEL.ASAG.ANCHORS, "MODEL.ASAG"
    count = node.NUM_DECODERS
    if count > 1 and not -count <= node.USED_HEAD < count:  # one: see ParallelDecoders
        raise ConfigError(
            f"{key}.USED_HEAD is {node.USED_HEAD}; write a decoder from 0 to {count - 1}, or -1 "
            "for the last."
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
    check_table(cfg, rules.DYNAMIC_RCNN, key)
    if node.WARMUP_IOU > node.MAX_IOU:
        raise ConfigError(
            f"{key} has WARMUP_IOU {node.WARMUP_IOU} and MAX_IOU {node.MAX_IOU}; write a "
            "WARMUP_IOU of at most MAX_IOU."
        )


def _check_generalized_rcnn(cfg: CfgNode) -> None:
    _check_num_classes("MODEL.ROI_HEADS.NUM_CLASSES", cfg.MODEL.ROI_HEADS.NUM_CLASSES)
    for key, registry in (
        ("MODEL.ROI_HEADS.NAME", ROI_HEADS_REGISTRY),
        ("MODEL.PROPOSAL_GENERATOR.NAME", PROPOSAL_GENERATOR_REGISTRY),
        ("MODEL.ANCHOR_GENERATOR.NAME", ANCHOR_GENERATOR_REGISTRY),
        ("MODEL.RPN.HEAD_NAME", RPN_HEAD_REGISTRY),
    ):
        check_name(key, rules.value_of(cfg, key), registry)
    heads = ROI_HEADS_REGISTRY.get(cfg.MODEL.ROI_HEADS.NAME)
    if issubclass(heads, StandardROIHeads):
        check_name("MODEL.ROI_BOX_HEAD.NAME", cfg.MODEL.ROI_BOX_HEAD.NAME, ROI_BOX_HEAD_REGISTRY)
    check_unused(cfg, {f"MODEL.SparseRCNN.{part}.ENABLED": False for part in ("DLA", "DPG", "SQR")})
    check_table(cfg, rules.GENERALIZED_RCNN, "MODEL")
    levels = len(cfg.MODEL.RPN.IN_FEATURES)
    for name in ("SIZES", "ASPECT_RATIOS"):
        if len(values := cfg.MODEL.ANCHOR_GENERATOR[name]) not in (1, levels):
            raise ConfigError(
                f"MODEL.ANCHOR_GENERATOR.{name} has {len(values)} entries for the {levels} maps of "
                "MODEL.RPN.IN_FEATURES; write one for each, or a single one for all."
            )
    _check_anchors(cfg.MODEL.ANCHOR_GENERATOR)
    if issubclass(heads, ChecksConfig):
        heads.check_config(cfg)


def _check_anchors(node: CfgNode) -> None:
    """Check that all maps have the same number of anchors, as one head predicts for them."""
    sizes, ratios = (
        values if isinstance(values[0], (list, tuple)) else [values]  # a list for all maps
        for values in (node.SIZES, node.ASPECT_RATIOS)
    )
    pairs = zip(sizes, ratios, strict=True) if len(sizes) == len(ratios) else product(sizes, ratios)
    if len({len(of_map) * len(shapes) for of_map, shapes in pairs}) > 1:
        raise ConfigError(
            f"MODEL.ANCHOR_GENERATOR has SIZES {list(sizes)} and ASPECT_RATIOS {list(ratios)}, so "
            "that locations of the maps have different numbers of anchors, but one head predicts "
            "for all. Write as many for each map."
        )


def _check_training(cfg: CfgNode) -> None:
    check_table(cfg, rules.TRAINING)
    solver, loader = cfg.SOLVER, cfg.DATALOADER
    samplers = ["TrainingSampler", "RepeatFactorTrainingSampler"]
    if "RANDOM_SUBSET_RATIO" in loader:  # a key of Detectron2's main branch
        samplers.append("RandomSubsetTrainingSampler")
        check_value("DATALOADER.RANDOM_SUBSET_RATIO", loader.RANDOM_SUBSET_RATIO, rules.above(0, 1))
    check_value("DATALOADER.SAMPLER_TRAIN", loader.SAMPLER_TRAIN, one_of(*samplers))
    if solver.REFERENCE_WORLD_SIZE and solver.IMS_PER_BATCH % solver.REFERENCE_WORLD_SIZE:
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH is {solver.IMS_PER_BATCH}, no multiple of "
            f"SOLVER.REFERENCE_WORLD_SIZE {solver.REFERENCE_WORLD_SIZE}; correct one of them."
        )
    if solver.NESTEROV and not (solver.OPTIMIZER == "SGD" and solver.MOMENTUM):
        raise ConfigError(
            "SOLVER.NESTEROV is True, which needs SOLVER.OPTIMIZER SGD and a SOLVER.MOMENTUM "
            "above 0. Write SOLVER.NESTEROV False."
        )
    if cfg.SOLVER.EPOCHS.MAX == 0 and any(cfg.SOLVER.EPOCHS.values()):
        raise ConfigError(
            "SOLVER.EPOCHS.MAX is 0, so the other keys of SOLVER.EPOCHS have no effect. Write the "
            "number of epochs to train."
        )
    best, aug = cfg.TEST.BEST, cfg.TEST.AUG
    is_ours = issubclass(architecture_of(cfg), CheckedArchitecture)
    if aug.ENABLED and aug.SCALE_FILTER and is_ours:
        pairs = [p for p in aug.SCALE_RANGES if isinstance(p, (list, tuple)) and len(p) == 2]
        if len(pairs) != len(aug.MIN_SIZES) or len(pairs) != len(aug.SCALE_RANGES):
            raise ConfigError(
                f"TEST.AUG.SCALE_RANGES has {len(pairs)} pairs for the {len(aug.MIN_SIZES)} sizes "
                "of TEST.AUG.MIN_SIZES; write a pair such as [0, 10000] for each, or "
                "TEST.AUG.SCALE_FILTER False."
            )
    if cfg.VIS_PERIOD and is_ours:
        raise ConfigError(
            f"VIS_PERIOD is {cfg.VIS_PERIOD}, but {cfg.MODEL.META_ARCHITECTURE} draws nothing in "
            "training. Write VIS_PERIOD 0; LOG.IMAGES draws predictions at every evaluation."
        )
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


def _check_input(cfg: CfgNode) -> None:
    check_table(cfg, rules.INPUT, "INPUT")
    sizes, crop = list(cfg.INPUT.MIN_SIZE_TRAIN), cfg.INPUT.CROP
    if cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range" and (len(sizes) != 2 or sizes[0] > sizes[1]):
        raise ConfigError(
            f"INPUT.MIN_SIZE_TRAIN is {tuple(sizes)}; MIN_SIZE_TRAIN_SAMPLING range needs the "
            "smallest and the largest size."
        )
    height, width = crop.SIZE
    fits = {"absolute_range": height <= width}.get(crop.TYPE, True)
    if crop.TYPE.startswith("relative"):
        fits = max(height, width) <= 1
    elif not all(isinstance(side, int) for side in crop.SIZE):
        fits = False
    if crop.ENABLED and not fits:
        expected = {
            "absolute": "whole numbers of pixels",
            "absolute_range": "the smallest and the largest number of pixels",
        }.get(crop.TYPE, "fractions above 0 and at most 1")
        raise ConfigError(
            f"INPUT.CROP.SIZE is {tuple(crop.SIZE)}; INPUT.CROP.TYPE {crop.TYPE} needs {expected}."
        )
    node = cfg.INPUT.AUG
    is_cropped = crop.ENABLED or node.SCALE_JITTER.SIZE
    has_polygons = cfg.MODEL.MASK_ON and cfg.INPUT.MASK_FORMAT == "polygon"
    if has_polygons and is_cropped and find_spec("shapely") is None:
        key = "INPUT.CROP.ENABLED" if crop.ENABLED else "INPUT.AUG.SCALE_JITTER.SIZE"
        raise ConfigError(
            f"{key} crops images, and cropping polygons of masks needs the package shapely. Run "
            "pip install shapely, or write INPUT.MASK_FORMAT bitmask."
        )
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
