"""Rules of single config keys: a table of keys and the values they take, and types of all keys.

`dsrcnn.config.validate` applies the tables of the parts that a config uses, and checks what depends
on several keys.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

from detectron2.config import CfgNode, get_cfg
from detectron2.layers import get_norm

from ..errors import ConfigError
from .defaults import add_dsrcnn_config


class Allowed(NamedTuple):
    """Values that a key takes, as a predicate and in words."""

    test: Callable[[Any], bool]
    words: str


Table = dict[str, Allowed]


def one_of(*values: object) -> Allowed:
    """Allow these values."""
    return Allowed(lambda v: v in values, f"one of {', '.join(map(shown, values))}")


def at_least(least: float, most: float = math.inf) -> Allowed:
    """Allow numbers from `least` on, up to and including `most`."""
    end = "" if most == math.inf else f" and at most {most:.10g}"
    return Allowed(lambda v: least <= v <= most, f"a number of at least {least:g}{end}")


def above(limit: float, most: float = math.inf) -> Allowed:
    """Allow numbers above `limit`, up to and including `most`."""
    end = "" if most == math.inf else f", at most {most:g}"
    return Allowed(lambda v: limit < v <= most, f"a number above {limit:g}{end}")


def optional(allowed: Allowed) -> Allowed:
    """Allow None as well."""
    return Allowed(lambda v: v is None or allowed.test(v), f"None or {allowed.words}")


def each(allowed: Allowed, words: str, counts: Sequence[int] = range(10**6)) -> Allowed:
    """Allow lists of as many such values as one of `counts`."""
    return Allowed(lambda v: len(v) in counts and all(map(allowed.test, v)), words)


def shown(value: object) -> str:
    """Return a value as one writes it in a config or command."""
    return str(value) or "''"


def _is_sizes(value: Any) -> bool:
    pairs = all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in value)
    return pairs and all(type(side) is int and 0 < side <= 100_000 for p in value for side in p)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and "\0" not in value


def _is_increasing(values: Sequence[float]) -> bool:
    return all(a < b for a, b in zip([0, *values], values, strict=False))


def _is_norm(name: Any) -> bool:
    try:
        get_norm(name, 32)
    except KeyError:
        return False
    return isinstance(name, str)


def _is_expected_result(entry: Any) -> bool:
    task, metric, *numbers = entry
    texts = isinstance(task, str) and isinstance(metric, str)
    return texts and len(numbers) == 2 and all(map(_is_number, numbers))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


_SOME = range(1, 10**6)  # counts of lists that are not empty
SWITCH_OFF = Allowed(lambda v: not v, "False; this package's loaders have boxes and masks only")
FRACTION = Allowed(lambda v: 0 <= v <= 1, "a number from 0 to 1")
BELOW_ONE = Allowed(lambda v: 0 <= v < 1, "a number from 0 to below 1")
INSIDE = Allowed(lambda v: 0 < v < 1, "a number above 0 and below 1")
COUNT = at_least(1, 100_000)
RANGE = Allowed(
    lambda v: len(v) == 2 and 0 < v[0] <= v[1], "the smallest and the largest factor, both above 0"
)
NORM = Allowed(_is_norm, "one of '', BN, SyncBN, FrozenBN, GN")
SIDE = at_least(32, 100_000)  # of images; smaller ones have no pixels left in coarse levels
SIDE_OR_ZERO = Allowed(lambda v: v == 0 or 16 <= v <= 100_000, "0, or a number of at least 16")
SIDES = each(SIDE_OR_ZERO, "numbers of pixels from 16 on, such as (480, 800)", _SOME)
TEXT = Allowed(_is_text, "a name that is not empty")
NAMES = each(TEXT, "names in parentheses, such as ('shapes_train',)")
LENGTHS = Allowed(
    lambda v: len(v) > 0 and all(x > 0 for x in _leaves(v)), "lists of numbers above 0"
)
LEVELS = each(TEXT, "names of feature maps, such as ('p2', 'p3', 'p4', 'p5')", _SOME)
FOUR_ABOVE_0 = each(above(0), "four numbers above 0", (4,))
LOSS_TYPE = one_of("smooth_l1", "giou", "diou", "ciou")

SPARSE_RCNN: Table = {
    **dict.fromkeys(
        ("NUM_PROPOSALS", "NUM_HEADS", "NHEADS", "HIDDEN_DIM", "DIM_DYNAMIC", "DIM_FEEDFORWARD"),
        COUNT,
    ),
    **dict.fromkeys(("NUM_CLS", "NUM_REG"), at_least(0, 100)),
    **dict.fromkeys(
        ("CLASS_WEIGHT", "GIOU_WEIGHT", "L1_WEIGHT", "NO_OBJECT_WEIGHT", "GAMMA"), at_least(0)
    ),
    "INFERENCE_STAGES": at_least(0, 100),
    "PRIOR_PROB": INSIDE,
    "ALPHA": FRACTION,
    "DROPOUT": BELOW_ONE,
    "NUM_DYNAMIC": one_of(2),
    "BOX_WEIGHTS": FOUR_ABOVE_0,
    "ACTIVATION": one_of("relu", "gelu"),
    "OVERLAP": one_of("iou", "giou", "diou", "ciou"),
    "PROPOSALS.BOXES": one_of("image", "center", "grid", "random"),
    "NMS.ENABLED": Allowed(lambda v: v in (None, True, False), "True, False or None"),
    "NMS.THRESHOLD": FRACTION,
    "DLA.NORMALIZER": one_of("positives", "gt"),
    **dict.fromkeys(("DLA.TOP_Q", "DLA.ITERATIONS"), COUNT),
    **dict.fromkeys(("DLA.STATIC_UNITS", "DLA.UNIT_STEP"), at_least(0)),
    **dict.fromkeys(("DLA.CLASS_COST", "DLA.L1_COST", "DLA.GIOU_COST"), at_least(0)),
    "DLA.EPSILON": above(0),
    "DLA.MAX_POSITIVE_FRACTION": above(0, 1),
    "DPG.NORM": one_of("none", "BN", "SyncBN", "FrozenBN", "GN"),
    **dict.fromkeys(("DPG.NUM_EXPERTS", "DPG.RESIZE", "DPG.HIDDEN"), COUNT),
    **dict.fromkeys(("DPG.BOX_JITTER", "DPG.TILING_NOISE"), at_least(0)),
    "DPG.TAU_ITERS": optional(at_least(0)),
    **dict.fromkeys(("DPG.TAU_START", "DPG.TAU_END"), above(0)),
    "SQR.MODE": one_of("selective", "dense"),
    "SQR.CHUNK": at_least(0),
}
ADAMIXER: Table = dict.fromkeys(("IN_POINTS", "OUT_POINTS"), COUNT)
DEFORMABLE_DETR: Table = {"ENCODER_LAYERS": at_least(0, 100)}
ASAG: Table = {
    "DECODER": one_of("AdaMixer", "SparseRCNN"),
    "NUM_DECODERS": at_least(1, 100),
    "GUIDED_PART": BELOW_ONE,
    "DN.NUM": COUNT,
    "ANCHORS.INFERENCE_LEVEL": one_of("P3P6", "P4P6", "P5P6"),
    **{f"ANCHORS.{k}": COUNT for k in ("FIXED", "PROBED", "HIDDEN", "MIN")},
    "ANCHORS.MAX_PATCHES": at_least(0),
    **dict.fromkeys(("ANCHORS.LOW", "ANCHORS.HIGH", "ANCHORS.OUTPUT"), FRACTION),
}
# Keys of cascades with a fixed value in ASAG.
FIXED_IN_ASAG = {
    "MODEL.SparseRCNN.PROPOSALS.NAME": "",
    "MODEL.SparseRCNN.DLA.ENABLED": False,
    "MODEL.SparseRCNN.DPG.ENABLED": False,
    "MODEL.SparseRCNN.SQR.ENABLED": False,
    "MODEL.SparseRCNN.OVERLAP": "giou",
    "MODEL.SparseRCNN.DEEP_SUPERVISION": True,
    "MODEL.SparseRCNN.INFERENCE_STAGES": 0,
    "MODEL.SparseRCNN.SHARE_STAGES": False,
    "MODEL.SparseRCNN.DROPOUT": 0.0,
    "MODEL.SparseRCNN.ACTIVATION": "gelu",
    "MODEL.SparseRCNN.USE_FOCAL": True,
    "MODEL.COMPILE": False,
    "TEST.CUDA_GRAPH": False,
}
DYNAMIC_RCNN: Table = {
    **dict.fromkeys(("KI", "KE", "ITERATION_COUNT"), at_least(1)),
    "WARMUP_BETA": above(0),
    **dict.fromkeys(("WARMUP_IOU", "MAX_IOU"), above(0, 1)),
}
# Detectron2's Faster R-CNN.
GENERALIZED_RCNN: Table = {
    "ANCHOR_GENERATOR.SIZES": LENGTHS,
    "ANCHOR_GENERATOR.ASPECT_RATIOS": LENGTHS,
    "ANCHOR_GENERATOR.OFFSET": BELOW_ONE,
    "PROPOSAL_GENERATOR.MIN_SIZE": at_least(0),
    "RPN.IN_FEATURES": LEVELS,
    "RPN.IOU_THRESHOLDS": Allowed(
        lambda v: len(v) == 2 and 0 <= v[0] <= v[1] <= 1, "two numbers from 0 to 1, ascending"
    ),
    "RPN.IOU_LABELS": each(one_of(0, -1, 1), "three labels of 0, -1 and 1", (3,)),
    "RPN.CONV_DIMS": each(
        Allowed(lambda v: isinstance(v, int) and (v == -1 or v > 0), ""), "channels, or [-1]", _SOME
    ),
    **{f"RPN.{k}_NMS_TOPK_{p}": COUNT for k in ("PRE", "POST") for p in ("TRAIN", "TEST")},
    **dict.fromkeys(("RPN.BATCH_SIZE_PER_IMAGE", "ROI_HEADS.BATCH_SIZE_PER_IMAGE"), COUNT),
    **dict.fromkeys(("RPN.POSITIVE_FRACTION", "ROI_HEADS.POSITIVE_FRACTION"), FRACTION),
    **dict.fromkeys(("RPN.NMS_THRESH", "ROI_HEADS.NMS_THRESH_TEST"), FRACTION),
    "ROI_HEADS.SCORE_THRESH_TEST": FRACTION,
    **dict.fromkeys(("RPN.SMOOTH_L1_BETA", "ROI_BOX_HEAD.SMOOTH_L1_BETA"), at_least(0)),
    **dict.fromkeys(("RPN.LOSS_WEIGHT", "RPN.BBOX_REG_LOSS_WEIGHT"), at_least(0)),
    "ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT": at_least(0),
    **dict.fromkeys(("RPN.BBOX_REG_LOSS_TYPE", "ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE"), LOSS_TYPE),
    **dict.fromkeys(("ROI_BOX_HEAD.NUM_FC", "ROI_BOX_HEAD.NUM_CONV"), at_least(0, 100)),
    **dict.fromkeys(("ROI_BOX_HEAD.FC_DIM", "ROI_BOX_HEAD.CONV_DIM"), COUNT),
    "ROI_BOX_HEAD.NORM": NORM,
    **{f"{k}.BBOX_REG_WEIGHTS": FOUR_ABOVE_0 for k in ("RPN", "ROI_BOX_HEAD")},
}
MODEL: Table = {
    "NECK.NAME": one_of("FPN", "PAFPN", "BiFPN", "ChannelMapper", "InputProjection"),
    # Modes with CUDA graphs of their own fail where one region feeds the next.
    "COMPILE_MODE": one_of("default", "max-autotune-no-cudagraphs"),
    "TIMM.NORM": one_of("", "FrozenBN", "SyncBN", "GN"),
    "TIMM.DROP_PATH": BELOW_ONE,
    "TIMM.WINDOW": at_least(0, 1000),
    "PIXEL_MEAN": each(at_least(-math.inf), "three numbers, one per color", (3,)),
    "PIXEL_STD": each(above(0), "three numbers above 0, one per color", (3,)),
    "BACKBONE.FREEZE_AT": at_least(-1, 5),
    "FPN.OUT_CHANNELS": COUNT,
    "FPN.NORM": NORM,
    "FPN.FUSE_TYPE": one_of("sum", "avg"),
    "ROI_HEADS.IN_FEATURES": LEVELS,
    "ROI_BOX_HEAD.POOLER_RESOLUTION": at_least(1, 1000),
    "ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": at_least(0, 100),
    "ROI_BOX_HEAD.POOLER_TYPE": one_of("ROIAlignV2", "ROIAlign", "ROIPool"),
    "EMA.DECAY": INSIDE,
    "FREEZE": each(TEXT, "names of modules, such as ('backbone',)"),
    **dict.fromkeys(("KEYPOINT_ON", "LOAD_PROPOSALS"), SWITCH_OFF),
}
RESNETS: Table = {
    "DEPTH": one_of(18, 34, 50, 101, 152),
    "NORM": NORM,
    "RES5_DILATION": one_of(1, 2),
    **dict.fromkeys(("NUM_GROUPS", "WIDTH_PER_GROUP", "DEFORM_NUM_GROUPS"), COUNT),
    **dict.fromkeys(("RES2_OUT_CHANNELS", "STEM_OUT_CHANNELS"), COUNT),
    "OUT_FEATURES": each(
        one_of("stem", "res2", "res3", "res4", "res5"), "some of stem, res2, res3, res4, res5",
        range(1, 6),
    ),
    "DEFORM_ON_PER_STAGE": each(one_of(True, False), "four times True or False", (4,)),
}  # fmt: skip
# What is used before the rest can be checked.
RUN: Table = {
    "VERSION": one_of(2),
    **dict.fromkeys(("DATASETS.TRAIN", "DATASETS.TEST"), NAMES),
    "DATASETS.CUSTOM.CLASSES": each(TEXT, "names of classes, such as ('cat', 'dog')"),
    **{
        f"DATASETS.PROPOSAL_FILES_{k}": Allowed(lambda v: not v, "(); proposals are not loaded")
        for k in ("TRAIN", "TEST")
    },
    "MODEL.DEVICE": Allowed(
        lambda v: bool(re.fullmatch(r"cpu|meta|(cuda|mps|xpu)(:\d{1,4})?", v)),
        "cpu, cuda, or cuda:1 for another GPU",
    ),
    # numpy's generators take 32 bits, and processes add their rank.
    "SEED": Allowed(lambda v: v <= 4_000_000_000, "a number up to 4000000000, or -1 to draw one"),
    "FLOAT32_PRECISION": one_of("", "highest", "high", "medium"),
    "DISTRIBUTED_TIMEOUT": above(0, 10**7),
    "OUTPUT_DIR": TEXT,
}
TRAINING: Table = {
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": one_of("full_model", "norm", "value"),
    **{f"SOLVER.CLIP_GRADIENTS.{k}": above(0) for k in ("CLIP_VALUE", "NORM_TYPE")},
    "SOLVER.OPTIMIZER": one_of("ADAMW", "SGD"),
    "SOLVER.AMP.PRECISION": one_of("bf16", "fp16"),
    "SOLVER.LR_SCHEDULER_NAME": one_of(
        "WarmupMultiStepLR", "WarmupCosineLR", "WarmupCosineRestartsLR"
    ),
    "SOLVER.BASE_LR": above(0),
    "SOLVER.CHECKPOINTS_KEPT": at_least(0),
    "SOLVER.MAX_ITER": at_least(1, 10**9),
    "SOLVER.STEPS": Allowed(
        lambda v: all(isinstance(s, int) for s in v) and _is_increasing(v),
        "whole numbers of iterations above 0, each larger than the one before",
    ),
    "SOLVER.EPOCHS.STEPS": Allowed(
        _is_increasing, "numbers of epochs above 0, each larger than the one before"
    ),
    "SOLVER.GAMMA": above(0, 1),
    "SOLVER.MOMENTUM": BELOW_ONE,
    "SOLVER.WARMUP_FACTOR": FRACTION,
    "SOLVER.WARMUP_METHOD": one_of("linear", "constant"),
    **dict.fromkeys(("SOLVER.WARMUP_ITERS", "SOLVER.CHECKPOINT_PERIOD"), at_least(0)),
    "SOLVER.WEIGHT_DECAY": at_least(0),
    "SOLVER.WEIGHT_DECAY_NORM": Allowed(
        lambda v: v == 0, "0: norms decay like all else, or not with SOLVER.NO_DECAY ('norm',)"
    ),
    **dict.fromkeys(("SOLVER.WEIGHT_DECAY_BIAS", "SOLVER.NECK_MULTIPLIER"), optional(at_least(0))),
    **dict.fromkeys(("SOLVER.BIAS_LR_FACTOR", "SOLVER.BACKBONE_MULTIPLIER"), at_least(0)),
    "SOLVER.LAYER_DECAY": above(0, 1),
    **dict.fromkeys(("SOLVER.ACCUMULATE", "SOLVER.IMS_PER_BATCH"), COUNT),
    **{f"SOLVER.EPOCHS.{k}": at_least(0, 10**6) for k in ("MAX", "WARMUP", "CHECKPOINT", "EVAL")},
    **dict.fromkeys(("SOLVER.REFERENCE_BATCH", "SOLVER.REFERENCE_WORLD_SIZE"), at_least(0)),
    "SOLVER.NO_DECAY": each(
        one_of("norm", "bias", "embedding", "position"), "some of norm, bias, embedding, position"
    ),
    **dict.fromkeys(("TEST.BEST.PATIENCE", "TEST.EVAL_PERIOD", "VIS_PERIOD"), at_least(0)),
    "TEST.DETECTIONS_PER_IMAGE": COUNT,
    "TEST.MAX_DETECTIONS": at_least(1, 100_000),
    "TEST.EXPECTED_RESULTS": each(
        Allowed(_is_expected_result, ""), "entries such as ['bbox', 'AP', 38.5, 0.2]"
    ),
    "TEST.AUG.MIN_SIZES": each(at_least(16, 100_000), "numbers of pixels from 16 on", _SOME),
    "TEST.AUG.MAX_SIZE": SIDE,
    "TEST.PRECISE_BN.NUM_ITER": at_least(1),
    **dict.fromkeys(("LOG.IMAGES", "LOG.PERIOD"), at_least(0)),
    "LOG.LEVEL": one_of("normal", "verbose"),
    "HOOKS.AFTER_EVAL": each(TEXT, "the words of a command, such as ('rsync', '{output}', '/b')"),
    "DATALOADER.NUM_WORKERS": at_least(0, 256),
    "DATALOADER.REPEAT_THRESHOLD": FRACTION,
}
INPUT: Table = {
    "FORMAT": one_of("RGB", "BGR"),
    "MASK_FORMAT": one_of("polygon", "bitmask"),
    "MIN_SIZE_TRAIN": SIDES,
    "MIN_SIZE_TRAIN_SAMPLING": one_of("choice", "range"),
    **dict.fromkeys(("MAX_SIZE_TRAIN", "MAX_SIZE_TEST"), SIDE),
    "MIN_SIZE_TEST": SIDE_OR_ZERO,
    "CROP.TYPE": one_of("relative_range", "relative", "absolute", "absolute_range"),
    "CROP.SIZE": each(above(0), "height and width, both above 0", (2,)),
    "RANDOM_FLIP": one_of("none", "horizontal", "vertical"),
    "PAD_TO": at_least(0, 100_000),
    "NUM_BUCKETS": at_least(0, 1000),
    "BUCKETS": Allowed(_is_sizes, "pairs (height, width) of whole numbers above 0"),
    **{f"AUG.{k}": FRACTION for k in ("VERTICAL_FLIP", "MIN_VISIBLE", "PLAIN_END")},
    **{
        f"AUG.{k}.PROB": FRACTION
        for k in ("HSV", "BLUR", "NOISE", "WARP", "MOSAIC", "MIXUP", "COPY_PASTE")
    },
    **{f"AUG.WARP.{k}": at_least(0, 180) for k in ("DEGREES", "SHEAR")},
    "AUG.WARP.TRANSLATE": at_least(0, 1),
    "AUG.WARP.PERSPECTIVE": Allowed(lambda v: 0 <= v < 0.5, "a number from 0 to below 0.5"),
    "AUG.WARP.SCALE": RANGE,
    "AUG.MOSAIC.SIZE": SIDE,
    "AUG.SCALE_JITTER.SIZE": Allowed(
        lambda v: v == 0 or 32 <= v <= 100_000, "0, or a number of at least 32"
    ),
}


def check_table(cfg: CfgNode, table: Table, prefix: str = "") -> None:
    """Raise a `ConfigError` for the first key below `prefix` with a value that is not allowed."""
    for name, allowed in table.items():
        key = f"{prefix}.{name}" if prefix else name
        check_value(key, value_of(cfg, key), allowed)


def check_value(key: str, value: Any, allowed: Allowed) -> None:
    """Raise a `ConfigError` unless a value is allowed."""
    try:
        is_allowed = allowed.test(value)
    except (TypeError, ValueError):  # not comparable
        is_allowed = False
    if not is_allowed:
        raise ConfigError(f"{key} is {_displayed(value)}; write {allowed.words}.")


def value_of(cfg: CfgNode, key: str) -> Any:
    """Return the value of a dotted key."""
    node: Any = cfg
    for part in key.split("."):
        node = node[part]
    return node


def check_types(cfg: CfgNode) -> None:
    """Check that values have the types of their defaults, and that numbers are finite.

    Yacs takes None for every value, any elements of lists, and NaN. Keys that users have added are
    not checked.

    Raises:
        ConfigError: naming the key, the value and an example.
    """
    for key, default in _defaults():
        value = value_of(cfg, key)
        if default is None or value is default:
            continue
        is_list, kind = isinstance(default, (list, tuple)), _kind_of(default)
        elements = [*_leaves(value)]
        fits = kind is None or all(_fits(element, kind) for element in elements)
        if value is None or not fits or isinstance(value, (list, tuple)) != is_list:
            words = {
                bool: "True or False",
                str: "text",
                float: "numbers" if is_list else "a number",
            }
            expected = words.get(kind, "a list") if kind else "a list"
            raise ConfigError(
                f"{key} is {_displayed(value)}; write {expected}, such as {default!r}."
            )
        if any(isinstance(element, str) and "\0" in element for element in elements):
            raise ConfigError(f"{key} is {_displayed(value)}; remove the NUL character.")
        numbers = [e for e in elements if isinstance(e, float)]
        is_infinite_norm = key == "SOLVER.CLIP_GRADIENTS.NORM_TYPE" and value == math.inf
        if not all(map(math.isfinite, numbers)) and not is_infinite_norm:
            raise ConfigError(
                f"{key} is {_displayed(value)}, which is not finite; write a number such as "
                f"{default!r}."
            )


@cache
def _defaults() -> tuple[tuple[str, Any], ...]:
    def walk(node: CfgNode, prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in node.items():
            if isinstance(value, CfgNode):
                yield from walk(value, f"{prefix}{name}.")
            else:
                yield prefix + name, value

    return tuple(walk(add_dsrcnn_config(get_cfg()), ""))


def _leaves(value: Any) -> Iterator[Any]:
    """Yield the elements of nested lists, or the value itself."""
    if isinstance(value, (list, tuple)):
        for element in value:
            yield from _leaves(element)
    else:
        yield value


def _kind_of(default: Any) -> type | None:
    """Return bool, float (any number) or str as the type of a default or its elements."""
    for element in _leaves(default):
        if isinstance(element, bool):
            return bool
        return float if _is_number(element) else type(element)
    return None


def _fits(value: Any, kind: type) -> bool:
    return _is_number(value) if kind is float else isinstance(value, kind)


def _displayed(value: Any) -> str:
    is_list = isinstance(value, Iterable) and not isinstance(value, (str, dict))
    return shortened(repr(tuple(value) if is_list else value))


def shortened(text: str) -> str:
    """Put a text on one line of at most 200 characters."""
    line = " ".join(text.split())
    return line if len(line) <= 200 else f"{line[:200]}..."
