#!/usr/bin/env python
r"""Convert a published Deformable DETR checkpoint for ``MODEL.WEIGHTS``.

python tools/convert_deformable_detr.py r50_deformable_detr_plus_iterative_bbox_refinement.pth \
    deformable_detr.pth
python train_net.py --eval-only --config-file coco/deformable_detr_R50_50ep \
    MODEL.WEIGHTS deformable_detr.pth

It takes files of the official code (fundamentalvision/Deformable-DETR) and those of mmdetection 2
and 3; SQR was published in version 2. Models without box refinement fit
``coco/deformable_detr_plain_R50_50ep``, those with two stages
``coco/deformable_detr_two_stage_R50_50ep``.
"""

import argparse
import re
import sys

import torch
from conversion import converter_parser, detectron2_key, read_or_exit, rename_all, rename_part
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

_CANDIDATES = r"transformer\.(?=(enc_output|pos_trans)(_norm)?\.)"
_OFFICIAL = [
    (r"query_embed\.", "init_proposal_features."),
    (r"transformer\.level_embed$", "encoder.level_embed"),
    (r"transformer\.reference_points\.", "proposal_generator.reference_points."),
    (_CANDIDATES, "proposal_generator."),
    (r"transformer\.encoder\.layers\.", "encoder.layers."),
    (r"transformer\.decoder\.layers\.", "head.head_series."),
]
_MMDETECTION = [
    (rf"bbox_head\.{_CANDIDATES}", "proposal_generator."),
    (r"bbox_head\.query_embedding\.", "init_proposal_features."),
    (r"bbox_head\.transformer\.level_embeds$", "encoder.level_embed"),
    (r"bbox_head\.transformer\.reference_points\.", "proposal_generator.reference_points."),
    (r"bbox_head\.transformer\.encoder\.layers\.", "encoder.layers."),
    (r"bbox_head\.transformer\.decoder\.layers\.", "head.head_series."),
]
# Since version 3 the transformer is not a part of the head.
_MMDETECTION_3 = [
    (r"query_embedding\.", "init_proposal_features."),
    (r"level_embed$", "encoder.level_embed"),
    (r"reference_points_fc\.", "proposal_generator.reference_points."),
    (r"memory_trans_fc\.", "proposal_generator.enc_output."),
    (r"memory_trans_norm\.", "proposal_generator.enc_output_norm."),
    (r"pos_trans_fc\.", "proposal_generator.pos_trans."),
    (r"(?=pos_trans_norm\.)", "proposal_generator."),
    (r"(?=encoder\.layers\.)", ""),
    (r"decoder\.layers\.", "head.head_series."),
]
# Inside of the layers of mmdetection; the decoder has one kind of attention more.
_ENCODER_PARTS = {
    "attentions.0.": "self_attn.", "norms.0.": "norm1.", "norms.1.": "norm2.",
    "ffns.0.layers.0.0.": "linear1.", "ffns.0.layers.1.": "linear2.",
    "self_attn.": "self_attn.", "ffn.layers.0.0.": "linear1.", "ffn.layers.1.": "linear2.",
}  # fmt: skip
_DECODER_PARTS = _ENCODER_PARTS | {
    "attentions.0.attn.": "self_attn.", "attentions.1.": "cross_attn.",
    "self_attn.attn.": "self_attn.", "cross_attn.": "cross_attn.",
    "norms.0.": "norm2.", "norms.1.": "norm1.", "norms.2.": "norm3.",
}  # fmt: skip
_IDS = 91  # outputs of the official classifiers, one for each id of COCO's categories


def our_key(key: str) -> str | None:
    """Return our name of a published parameter, None to drop it.

    Raises:
        KeyError: if the parameter is unknown.
    """
    if key.endswith("num_batches_tracked"):
        return None
    if key.startswith(("transformer.decoder.bbox_embed.", "transformer.decoder.class_embed.")):
        return None  # the same as those outside of the decoder
    projection = re.match(r"input_proj\.(\d)\.(\d)\.", key)
    if projection:
        part = "norm." if projection[2] == "1" else ""
        return f"backbone.convs.{projection[1]}.{part}{key[projection.end() :]}"
    if key.startswith("backbone."):
        name = re.sub(r"^backbone\.(0\.body\.)?", "", key)
        return f"backbone.bottom_up.{detectron2_key(name)}"
    prediction = re.match(r"(class|bbox)_embed\.(\d)\.(layers\.(\d)\.)?", key)
    if prediction:
        part = f"{2 * int(prediction[4])}." if prediction[4] else ""
        name = f"head.head_series.{prediction[2]}.{prediction[1]}_embed.{part}"
        return name + key[prediction.end() :]
    is_official = key.startswith(("transformer.", "query_embed."))
    return rename_part(key, _OFFICIAL) if is_official else _key_of_mmdetection(key)


def _key_of_mmdetection(key: str) -> str:
    neck = re.match(r"neck\.(convs|extra_convs)\.(\d)\.(conv|gn)\.", key)
    if neck:
        index = int(neck[2]) + 3 * (neck[1] == "extra_convs")
        return f"backbone.convs.{index}.{'norm.' if neck[3] == 'gn' else ''}{key[neck.end() :]}"
    prediction = re.match(r"bbox_head\.(cls|reg)_branches\.(\d)\.", key)
    if prediction:
        kind = "class_embed" if prediction[1] == "cls" else "bbox_embed"
        return f"head.head_series.{prediction[2]}.{kind}.{key[prediction.end() :]}"
    name = rename_part(key, _MMDETECTION if key.startswith("bbox_head.") else _MMDETECTION_3)
    layer = re.match(r"(encoder\.layers|head\.head_series)\.\d+\.", name)
    if not layer:
        return name
    parts = _ENCODER_PARTS if name.startswith("encoder") else _DECODER_PARTS
    rest = name[layer.end() :]
    for part in sorted(parts, key=len, reverse=True):
        if rest.startswith(part):
            return layer[0] + parts[part] + rest.removeprefix(part)
    raise KeyError(key)


def move_candidates(state: dict[str, torch.Tensor]) -> None:
    """Rename the predictions of the encoder, which follow those of the stages, in place.

    Of their classes, all of which are trained as background but the first, that one is kept.
    """
    if "proposal_generator.enc_output.weight" not in state:
        return
    pattern = r"head\.head_series\.(\d+)\.((class|bbox)_embed\..*)"
    found = {key: match for key in state if (match := re.fullmatch(pattern, key))}
    last = max(int(match[1]) for match in found.values())
    for key, match in found.items():
        if int(match[1]) == last:
            value = state.pop(key)
            value = value[:1].clone() if match[3] == "class" else value
            state[f"proposal_generator.{match[2]}"] = value


def use_our_classes(state: dict[str, torch.Tensor]) -> None:
    """Keep the outputs of the 80 classes where there is one for each id of COCO, in place."""
    ids = [x["id"] for x in COCO_CATEGORIES if x["isthing"]]
    for key, value in state.items():
        if ".class_embed." in key and len(value) == _IDS:
            state[key] = value[ids].clone()


def add_biases(state: dict[str, torch.Tensor]) -> None:
    """Add zero biases to convolutions of the neck, which mmdetection's lack, in place."""
    for key, value in list(state.items()):
        if re.fullmatch(r"backbone\.convs\.\d\.weight", key):
            state.setdefault(key.replace("weight", "bias"), value.new_zeros(len(value)))


def main() -> None:
    """Read, rename, write."""
    args = converter_parser(__doc__).parse_args()
    torch.serialization.add_safe_globals([argparse.Namespace])  # options of the training script
    content = read_or_exit(args.source, trust=args.trust)
    state = content.get("model", content.get("state_dict", content))
    try:
        model = rename_all(state, our_key)
    except KeyError as error:
        sys.exit(f"{args.source} is no Deformable DETR checkpoint as expected: {error.args[0]}.")
    move_candidates(model)
    use_our_classes(model)
    add_biases(model)
    torch.save({"model": model, "__author__": "Deformable DETR"}, args.target)


if __name__ == "__main__":
    main()
