"""Functions that the converters of checkpoints share."""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dsrcnn.engine.weight_io import read_weights
from dsrcnn.errors import DsrcnnError

# Patterns in a stage of AdaMixer, and our names; None keeps the name. The first match counts.
DECODER_PARTS = [
    (r"attention\.(attn\.)?(?=in_proj|out_proj)", "attention.attention."),
    (r"attention_norm\.", "attention.norm."),
    (r"iof_tau$", "attention.iof_tau"),
    (r"ffn\.layers\.0\.(0\.)?", "linear1."),
    (r"ffn\.layers\.1\.", "linear2."),
    (r"ffn_norm\.", "ffn_norm."),
    (r"sampling_n_mixing\.sampling_offset_generator\.0\.", "sampling_offset_generator."),
    (r"sampling_n_mixing\.adaptive_mixing\.parameter_generator\.0\.",
     "adaptive_mixing.parameter_generator."),
    (r"sampling_n_mixing\.adaptive_mixing\.out_proj\.", "adaptive_mixing.out_proj."),
    (r"sampling_n_mixing\.norm\.", "mixing_norm."),
    (r"((cls|reg)_fcs\.\d+|fc_cls|fc_reg)\.", None),
]  # fmt: skip


def detectron2_key(key: str) -> str:
    """Return Detectron2's name of a parameter of torchvision's ResNet."""
    if not key.startswith("layer"):
        key = f"stem.{key}"
    key = re.sub(r"^layer(\d)", lambda m: f"res{int(m[1]) + 1}", key)
    key = re.sub(r"\bbn(\d)", r"conv\1.norm", key)
    return key.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")


def rename_part(key: str, parts: list[tuple[str, str | None]]) -> str:
    """Replace the first pattern that matches the start of a name.

    Raises:
        KeyError: if none does.
    """
    for pattern, name in parts:
        match = re.match(pattern, key)
        if match:
            return key if name is None else name + key[match.end() :]
    raise KeyError(key)


def rename_all(
    state: dict[str, torch.Tensor], our_key: Callable[[str], str | None]
) -> dict[str, torch.Tensor]:
    """Rename the parameters of a state dict.

    Args:
        state: published state dict.
        our_key: maps a published name to ours, None to drop it; a KeyError for an unknown one.

    Raises:
        KeyError: naming an unknown parameter, and how many there are.
    """
    renamed, unknown = {}, []
    for key, value in state.items():
        try:
            name = our_key(key)
        except KeyError:
            unknown.append(key)
            continue
        if name is not None:
            renamed[name] = value
    if unknown:
        raise KeyError(f"{len(unknown)} unknown parameters, such as {unknown[0]}")
    return renamed


def converter_parser(description: str | None) -> argparse.ArgumentParser:
    """Create a parser with the arguments ``source``, ``target`` and ``--trust``."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="checkpoint as published")
    parser.add_argument("target", type=Path, help="file to write")
    parser.add_argument("--trust", action="store_true", help="read it even if that runs its code")
    return parser


def read_or_exit(path: Path, *, trust: bool) -> Any:
    """Read a checkpoint; exit with a message if that fails."""
    try:
        return read_weights(str(path), trust=trust)
    except DsrcnnError as error:  # its advice is the config's key
        sys.exit(str(error).replace("MODEL.TRUST_WEIGHTS True", "--trust"))
