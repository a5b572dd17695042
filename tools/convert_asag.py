#!/usr/bin/env python
r"""Convert an official ASAG checkpoint (iSEE-Laboratory/ASAG) for ``MODEL.WEIGHTS``.

python tools/convert_asag.py asag_a_r50_1x.pth asag_a_R50_100pro_1x.pth
python train_net.py --eval-only --config-file coco/asag_a_R50_100pro_1x \
    MODEL.WEIGHTS asag_a_R50_100pro_1x.pth

With ``--head 2`` only that decoder is kept: the file is half as large, and is used with
``MODEL.ASAG.NUM_DECODERS 1``, which otherwise takes decoder ``USED_HEAD`` of a whole file.
Checkpoints of this package can be reduced likewise; averaged weights (``MODEL.EMA``) are preferred.
"""

import argparse
import re
import sys

import torch
from conversion import (
    DECODER_PARTS,
    converter_parser,
    detectron2_key,
    read_or_exit,
    rename_all,
    rename_part,
)

from dsrcnn.modeling.asag.queries import keep_decoder

_INITIALIZER_PARTS = [
    (r"tokens_norm1\.", "roi_norm."),
    (r"tokens_norm2\.", "ffn_norm."),
    (r"tokens_norm3\.", "attention.norm."),
    (r"tokens_proj\.layers\.0\.", "linear1."),
    (r"tokens_proj\.layers\.1\.", "linear2."),
    (r"attn\.", "attention.attention."),
    (r"iof_tau$", "attention.iof_tau"),
    (r"(roi|(cls|reg)_fcs\.\d+|fc_cls|fc_reg)\.", None),
]
_TRAINED = 1 << 40  # steps: a converted generator needs no guidance


def our_key(key: str) -> str | None:
    """Return our name of a published parameter, None to drop it.

    Raises:
        KeyError: if the parameter is unknown.
    """
    if key.endswith("num_batches_tracked"):
        return None
    if key.startswith("backbone.0.body."):
        return f"backbone.bottom_up.{detectron2_key(key.removeprefix('backbone.0.body.'))}"
    neck = re.match(r"neck\.(inner|layer)_blocks\.(\d)\.(0\.)?", key)
    if neck:
        kind = "lateral" if neck[1] == "inner" else "output"
        return f"backbone.fpn_{kind}{int(neck[2]) + 2}.{key[neck.end() :]}"
    if key.startswith("anchor_generator."):
        return f"generator.{key.removeprefix('anchor_generator.')}"
    if key.startswith("rpn."):
        return f"initializer.{rename_part(key.removeprefix('rpn.'), _INITIALIZER_PARTS)}"
    if key == "decoder.decoder_embedding.weight":
        return "decoders.decoder_embedding.weight"
    stage = re.match(r"decoder\.(bbox_head|head_series)\.(\d+)\.", key)
    if not stage:
        raise KeyError(key)
    rest = key[stage.end() :]
    rest = rename_part(rest, DECODER_PARTS) if stage[1] == "bbox_head" else rest
    return f"decoders.stages.{stage[2]}.{rest}"


def reduce_to_decoder(state: dict[str, torch.Tensor], head: int) -> dict[str, torch.Tensor]:
    """Reduce a state dict to one decoder.

    Raises:
        KeyError: if there is no such decoder.
    """
    count = len(state["decoders.decoder_embedding.weight"])
    if not 0 <= head < count:
        raise KeyError(f"has decoders 0 to {count - 1}, and no decoder {head}")
    return keep_decoder(state, head)


def main() -> None:
    """Read, rename, write."""
    parser = converter_parser(__doc__)
    parser.add_argument("--head", type=int, help="keep this decoder only, counted from 0")
    args = parser.parse_args()
    torch.serialization.add_safe_globals([argparse.Namespace])  # options of the training script
    content = read_or_exit(args.source, trust=args.trust)
    model = content["ema"]["model"] if "ema" in content else content.get("model", content)
    try:
        if not any(key.startswith("initializer.") for key in model):
            model = {**rename_all(model, our_key), "iteration": torch.tensor(_TRAINED)}
        if args.head is not None:
            model = reduce_to_decoder(model, args.head)
    except KeyError as error:
        sys.exit(f"{args.source} is no ASAG checkpoint as expected: {error.args[0]}.")
    torch.save({"model": model, "__author__": "ASAG"}, args.target)


if __name__ == "__main__":
    main()
