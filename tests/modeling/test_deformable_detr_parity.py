"""Deformable DETR against the implementation in transformers, with equal weights."""

import re

import pytest
import torch
from conftest import batch
from detectron2.modeling import build_model
from torch import nn

from dsrcnn.config import read_cfg

transformers = pytest.importorskip("transformers")

SIZES = [(64, 96), (90, 70)]
NAMES = [
    (r"^init_proposal_features\.weight", "model.query_position_embeddings.weight"),
    (r"^proposal_generator\.(class|bbox)_embed", r"head.head_series.3.\1_embed"),
    (r"^proposal_generator\.", "model."),
    (r"^encoder\.level_embed", "model.level_embed"),
    (r"^backbone\.convs\.(\d)\.norm", r"model.input_proj.\1.1"),
    (r"^backbone\.convs\.(\d)", r"model.input_proj.\1.0"),
    (r"^encoder\.", "model.encoder."),
    (r"^head\.head_series\.(\d)\.class_embed", r"class_embed.\1"),
    (r"^head\.head_series\.(\d)\.bbox_embed\.0", r"bbox_embed.\1.layers.0"),
    (r"^head\.head_series\.(\d)\.bbox_embed\.2", r"bbox_embed.\1.layers.1"),
    (r"^head\.head_series\.(\d)\.bbox_embed\.4", r"bbox_embed.\1.layers.2"),
    (r"^head\.head_series\.", "model.decoder.layers."),
    (r"(encoder\.layers\.\d)\.norm1", r"\1.self_attn_layer_norm"),
    (r"(encoder\.layers\.\d)\.norm2", r"\1.final_layer_norm"),
    (r"(decoder\.layers\.\d)\.norm1", r"\1.encoder_attn_layer_norm"),
    (r"(decoder\.layers\.\d)\.norm2", r"\1.self_attn_layer_norm"),
    (r"(decoder\.layers\.\d)\.norm3", r"\1.final_layer_norm"),
    (r"cross_attn", "encoder_attn"),
    (r"(layers\.\d)\.linear(\d)", r"\1.mlp.fc\2"),
    (r"self_attn\.out_proj", "self_attn.o_proj"),
]


def their_name(name):
    for pattern, replacement in NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def their_tensors(name, value):
    """Names and values of transformers' tensors that hold one of ours."""
    if "in_proj_" in name:
        stem, kind = their_name(name).split("in_proj_")
        parts = zip(("q_proj", "k_proj", "v_proj"), value.chunk(3), strict=True)
        return {f"{stem}{part}.{kind}": x for part, x in parts}
    return {their_name(name): value}


class OurMaps(nn.Module):
    """The feature maps of our network and their masks, in place of transformers' network."""

    def __init__(self, network, names, channels):
        super().__init__()
        self.network, self.names, self.intermediate_channel_sizes = network, names, channels

    def forward(self, images, mask):
        maps = [self.network(images)[name] for name in self.names]
        sizes = [x.shape[-2:] for x in maps]
        return [
            (x, nn.functional.interpolate(mask[None].float(), size=size)[0].bool())
            for x, size in zip(maps, sizes, strict=True)
        ]


def prefer_usable_tokens(model):
    """Let most tokens score above those in padding and at borders, which they may select, too."""
    source = model.proposals
    source.enc_output.bias.zero_()  # such tokens are zero, so their logit is that of the bias
    logits = model.predict(model.preprocess_image(batch(SIZES, [0, 0]))).candidates.logits
    excluded = source.class_embed(source.enc_output_norm.bias)
    usable = logits[logits > -20]
    if usable.median() < excluded:
        source.class_embed.weight.neg_()


VARIANTS = {
    "refinement": [],
    "plain": ["MODEL.DeformableDETR.BOX_REFINEMENT", False],
    "two stages": ["MODEL.SparseRCNN.PROPOSALS.NAME", "EncoderQueries"],
}


@pytest.fixture(params=VARIANTS)
def models(request):
    opts = ["MODEL.DEVICE", "cpu", "MODEL.SparseRCNN.NUM_CLASSES", 5, *VARIANTS[request.param]]
    refines, two_stages = request.param != "plain", request.param == "two stages"
    torch.manual_seed(0)
    ours = build_model(read_cfg("quick/deformable_detr_shapes", opts)).train()
    with torch.no_grad():  # nothing is zero or equal, as after training
        for name, parameter in ours.named_parameters():
            if not name.startswith("backbone.bottom_up"):
                parameter.add_(torch.randn_like(parameter) * 0.05)
        if two_stages:
            prefer_usable_tokens(ours)
    ours.backbone.bottom_up.eval()  # its batch norms would differ with the images of a batch
    config = transformers.DeformableDetrConfig(
        backbone_config=transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], layer_type="basic",
            out_features=["stage2", "stage3", "stage4"],
        ),
        d_model=64, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=256,
        decoder_ffn_dim=256, encoder_layers=2, decoder_layers=3, num_queries=12, num_labels=5,
        dropout=0.0, with_box_refine=refines, two_stage=two_stages, two_stage_num_proposals=12,
        attn_implementation="eager",
    )  # fmt: skip
    theirs = transformers.DeformableDetrForObjectDetection(config).train()
    channels = [128, 256, 512]
    theirs.model.backbone = OurMaps(ours.backbone.bottom_up, ["res3", "res4", "res5"], channels)
    for index, conv in enumerate(ours.backbone.convs):
        shape = (conv.in_channels, 64, conv.kernel_size, conv.stride, conv.padding)
        theirs.model.input_proj[index][0] = nn.Conv2d(*shape)
    if refines:  # predictions of stages are tied there, which is not as published
        box_network = type(theirs.bbox_embed[0])
        for index in range(3 + two_stages):
            theirs.class_embed[index] = nn.Linear(64, 5)
            theirs.bbox_embed[index] = box_network(64, 64, 4, 3)
        theirs.model.decoder.bbox_embed = theirs.bbox_embed
    if two_stages:
        theirs.model.decoder.class_embed = theirs.class_embed
    state = {}
    for name, value in ours.state_dict().items():
        if not name.startswith("backbone.bottom_up"):
            state |= their_tensors(name, value)
    if two_stages:  # their encoder has all classes, but uses the first
        for kind in ("weight", "bias"):
            value = state[f"class_embed.3.{kind}"]
            state[f"class_embed.3.{kind}"] = torch.cat(
                [value, value.new_zeros(4, *value.shape[1:])]
            )
    for part in ("bbox_embed", "class_embed"):  # the same modules under a second name
        if getattr(theirs.model.decoder, part, None) is not None:
            state |= {f"model.decoder.{k}": v for k, v in state.items() if k.startswith(part)}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.startswith("model.backbone.network") for name in missing)
    return ours, theirs


def fractions(boxes, sizes):
    """Center and size as fractions, of boxes (..., B, P, 4) xyxy in pixels."""
    low, high = (boxes / sizes.unsqueeze(1)).split(2, dim=-1)
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def outputs(ours, theirs):
    """Logits and boxes of all stages, and of the candidates if there are any, of both."""
    images = ours.preprocess_image(batch(SIZES, [2, 1]))
    predictions = ours.predict(images)
    height, width = images.tensor.shape[-2:]
    rows, columns = torch.arange(height).view(1, -1, 1), torch.arange(width).view(1, 1, -1)
    sizes = images.sizes.view(2, 4, 1, 1)
    mask = ((rows < sizes[:, 1]) & (columns < sizes[:, 0])).long()
    result = theirs(pixel_values=images.tensor, pixel_mask=mask, return_dict=True)
    hidden, references = result.intermediate_hidden_states, result.intermediate_reference_points
    logits, boxes = [], []
    for stage in range(hidden.shape[1]):
        reference = references[:, stage - 1] if stage else result.init_reference_points
        start = torch.special.logit(reference, eps=1e-5)
        change = theirs.bbox_embed[stage](hidden[:, stage])
        place = change[..., : start.shape[-1]] + start
        boxes.append(torch.cat([place, change[..., start.shape[-1] :]], -1).sigmoid())
        logits.append(theirs.class_embed[stage](hidden[:, stage]))
    torch.testing.assert_close(boxes[-1], result.pred_boxes)
    mine = [predictions.logits, fractions(predictions.boxes, images.sizes)]
    published = [torch.stack(logits), torch.stack(boxes)]
    candidates = predictions.candidates
    if candidates is not None:
        usable = result.enc_outputs_coord_logits[..., 0].isfinite()  # neither padding nor border
        published += [result.enc_outputs_class[..., 0][usable]]
        published += [result.enc_outputs_coord_logits.sigmoid()[usable]]
        mine += [candidates.logits[0, ..., 0][usable]]
        mine += [fractions(candidates.boxes[0], images.sizes)[usable]]
        assert (candidates.logits[0, ..., 0][~usable] == -20).all()
    return mine, published


def test_logits_and_boxes_of_all_stages_agree(models):
    with torch.no_grad():
        mine, published = outputs(*models)
    assert (mine[1][0] - mine[1][-1]).abs().max() > 0.01  # stages differ
    for a, b in zip(mine, published, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_gradients_agree(models):
    ours, theirs = (model.double() for model in models)  # no unit is on and off by rounding
    for logits_and_boxes in outputs(ours, theirs):
        logits, boxes = logits_and_boxes[::2], logits_and_boxes[1::2]
        loss = sum(x.square().mean() for x in logits)
        (loss + sum((x * torch.linspace(-1, 1, 4)).mean() for x in boxes)).backward()
    expected = {n: p.grad for n, p in theirs.named_parameters(remove_duplicate=False)}
    stored = {"proposals.init_proposal_": "init_proposal_", "proposals.": "proposal_generator."}
    checked = 0
    for name, parameter in ours.named_parameters():
        if name.startswith("backbone.bottom_up"):
            continue
        for old, new in stored.items():
            name = re.sub(f"^{old}", new, name)
        for their, value in their_tensors(name, parameter.grad).items():
            other = expected[their][: len(value)]
            # Relative to the largest; those of biases of keys are zero but for rounding.
            allowed = max(1e-3 * other.abs().max().item(), 1e-6)
            torch.testing.assert_close(value, other, rtol=1e-3, atol=allowed, msg=their)
            checked += 1
    assert checked > 100
