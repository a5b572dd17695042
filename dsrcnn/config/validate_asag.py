"""Checks of ASAG's keys."""

from detectron2.config import CfgNode

from ..errors import ConfigError
from .validate_training import expect_one_of

__all__ = ["check_asag"]


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
