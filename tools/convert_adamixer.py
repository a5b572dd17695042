#!/usr/bin/env python
"""Convert an official AdaMixer checkpoint (MCG-NJU/AdaMixer, mmdetection) for ``MODEL.WEIGHTS``.

python tools/convert_adamixer.py adamixer_r50_1x_coco.pth adamixer_R50_100pro_1x.pth
python train_net.py --eval-only --config-file coco/adamixer_R50_100pro_1x \
    MODEL.WEIGHTS adamixer_R50_100pro_1x.pth

Of a file that holds objects of mmdetection besides the weights, write ``--trust`` if you trust it:
reading them may run code.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import torch
from convert_torchvision import detectron2_key, rename_all

from dsrcnn.engine.weight_io import read_weights
from dsrcnn.errors import DsrcnnError

_STAGE = r"^roi_head\.bbox_head\.(\d+)\."
# In a stage: theirs, ours. The first that fits counts.
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
    (r"((cls|reg)_fcs\.\d+|fc_cls|fc_reg)\.", None),  # as it is
]  # fmt: skip


def renamed(key: str, start: int, parts: list[tuple[str, str | None]]) -> str:
    """Rename a parameter by the first of the parts that fits after `start`; None: as it is.

    Raises:
        KeyError: if none fits.
    """
    rest = key[start:]
    for theirs, ours in parts:
        found = re.match(theirs, rest)
        if found:
            return rest if ours is None else ours + rest[found.end() :]
    raise KeyError(key)


def our_key(key: str) -> str | None:
    """Our name of a parameter of theirs; None for what is not needed.

    Raises:
        KeyError: if the parameter is unknown.
    """
    stage = re.match(_STAGE, key)
    if stage:
        return f"head.head_series.{stage[1]}.{renamed(key, stage.end(), DECODER_PARTS)}"
    if key.endswith("num_batches_tracked") or key == "rpn_head.init_proposal_bboxes.weight":
        return None  # boxes are the whole image, and not learned
    if key == "rpn_head.init_content_features.weight":
        return "init_proposal_features.weight"
    if key.startswith("backbone."):
        return f"backbone.bottom_up.{detectron2_key(key.removeprefix('backbone.'))}"
    key = re.sub(r"^neck\.(lateral_convs|convs)\.(\d+)\.(conv\.)?", r"backbone.convs.\2.", key)
    key = re.sub(r"^neck\.gn(_out)?\.", "backbone.norm.", key)
    if not key.startswith("backbone."):
        raise KeyError(key)
    return key


def read_or_exit(path: Path, *, trust: bool) -> Any:
    """Content of a checkpoint; what is wrong with it is this tool's last word."""
    try:
        return read_weights(str(path), trust=trust)
    except DsrcnnError as error:  # which knows of the config's key alone
        sys.exit(str(error).replace("MODEL.TRUST_WEIGHTS True", "--trust"))


def main() -> None:
    """Read, rename, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="checkpoint as published")
    parser.add_argument("target", type=Path, help="file to write")
    parser.add_argument("--trust", action="store_true", help="read it even if that runs its code")
    args = parser.parse_args()
    content = read_or_exit(args.source, trust=args.trust)
    try:
        model = rename_all(content.get("state_dict", content), our_key)
    except KeyError as error:
        sys.exit(f"{args.source} is no AdaMixer checkpoint of mmdetection: {error.args[0]}.")
    torch.save({"model": model, "__author__": "AdaMixer"}, args.target)


if __name__ == "__main__":
    main()
