#!/usr/bin/env python
"""Convert an official AdaMixer checkpoint (MCG-NJU/AdaMixer, mmdetection) for ``MODEL.WEIGHTS``.

python tools/convert_adamixer.py adamixer_r50_1x_coco.pth adamixer_R50_100pro_1x.pth
python train_net.py --eval-only --config-file coco/adamixer_R50_100pro_1x \
    MODEL.WEIGHTS adamixer_R50_100pro_1x.pth

If the file also holds objects of mmdetection, write ``--trust`` if you trust it: reading them may
run code.
"""

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


def our_key(key: str) -> str | None:
    """Return our name of a published parameter, None to drop it.

    Raises:
        KeyError: if the parameter is unknown.
    """
    stage = re.match(r"^roi_head\.bbox_head\.(\d+)\.", key)
    if stage:
        return f"head.head_series.{stage[1]}.{rename_part(key[stage.end() :], DECODER_PARTS)}"
    if key.endswith("num_batches_tracked") or key == "rpn_head.init_proposal_bboxes.weight":
        return None  # initial boxes are the whole image, and not learned
    if key == "rpn_head.init_content_features.weight":
        return "init_proposal_features.weight"
    if key.startswith("backbone."):
        return f"backbone.bottom_up.{detectron2_key(key.removeprefix('backbone.'))}"
    key = re.sub(r"^neck\.(lateral_convs|convs)\.(\d+)\.(conv\.)?", r"backbone.convs.\2.", key)
    key = re.sub(r"^neck\.gn(_out)?\.", "backbone.norm.", key)
    if not key.startswith("backbone."):
        raise KeyError(key)
    return key


def main() -> None:
    """Read, rename, write."""
    args = converter_parser(__doc__).parse_args()
    content = read_or_exit(args.source, trust=args.trust)
    try:
        model = rename_all(content.get("state_dict", content), our_key)
    except KeyError as error:
        sys.exit(f"{args.source} is no AdaMixer checkpoint of mmdetection: {error.args[0]}.")
    torch.save({"model": model, "__author__": "AdaMixer"}, args.target)


if __name__ == "__main__":
    main()
