"""Converters of published checkpoints, on state dicts with their names and shapes."""

import argparse
import runpy
import sys
from fractions import Fraction

import pytest
import torch
import torchvision
from conftest import REPOSITORY, batch, tiny_cfg
from detectron2.modeling import build_model

from dsrcnn.config import read_cfg
from dsrcnn.engine.checkpoint import Checkpointer

TOOLS = REPOSITORY / "tools"


@pytest.fixture
def convert(monkeypatch):
    """Runs a converter in this process."""
    monkeypatch.syspath_prepend(str(TOOLS))

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(TOOLS / f"convert_{name}.py"), run_name="__main__")

    return run


def test_converted_torchvision_weights_give_the_same_features(tmp_path, convert):
    published = torchvision.models.resnet18().eval()
    torch.nn.init.normal_(published.bn1.running_mean)
    source, target = tmp_path / "resnet18.pth", tmp_path / "R-18.pkl"
    torch.save(published.state_dict(), source)
    convert("torchvision", source, target)
    model = build_model(tiny_cfg()).eval()
    Checkpointer(model).load(str(target))
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        features = model.backbone.bottom_up(image)["res5"]
        x = published.maxpool(published.relu(published.bn1(published.conv1(image))))
        expected = published.layer4(published.layer3(published.layer2(published.layer1(x))))
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)


def with_biases(prefix, layers):
    """Shapes of the weights and biases of layers, each (key, *shape of the weight)."""
    weights = {f"{prefix}{key}.weight": tuple(shape) for key, *shape in layers}
    return weights | {k.replace(".weight", ".bias"): shape[:1] for k, shape in weights.items()}


def resnet18(prefix):
    state = torchvision.models.resnet18().state_dict()
    return {f"{prefix}{k}": tuple(v.shape) for k, v in state.items() if not k.startswith("fc.")}


ATTENTION = {"in_proj_weight": (192, 64), "in_proj_bias": (192,)}
MIXING = [
    ("ffn_norm", 64), ("attention_norm", 64), ("sampling_n_mixing.norm", 64),
    ("sampling_n_mixing.sampling_offset_generator.0", 4 * 8 * 3, 64),
    ("sampling_n_mixing.adaptive_mixing.parameter_generator.0", 4 * 384, 64),
    ("sampling_n_mixing.adaptive_mixing.out_proj", 64, 4 * 16 * 16),
]  # fmt: skip


def published_adamixer(stages, logits):
    """An official AdaMixer checkpoint (ResNet-18 instead of 50)."""
    shapes = resnet18("backbone.")
    channels = enumerate((64, 128, 256, 512))
    shapes |= with_biases("neck.lateral_convs.", [(f"{i}.conv", 64, c, 1, 1) for i, c in channels])
    shapes |= with_biases("neck.", [("gn_out", 64)])
    shapes |= {"rpn_head.init_proposal_bboxes.weight": (12, 4)}
    shapes |= {"rpn_head.init_content_features.weight": (12, 64)}
    layers = [*MIXING, ("attention.attn.out_proj", 64, 64), ("fc_cls", logits, 64)]
    layers += [("ffn.layers.0.0", 256, 64), ("ffn.layers.1", 64, 256), ("fc_reg", 4, 64)]
    layers += [(f"{k}.0", 64, 64) for k in ("cls_fcs", "reg_fcs")]
    layers += [(f"{k}.1", 64) for k in ("cls_fcs", "reg_fcs")]
    for index in range(stages):
        prefix = f"roi_head.bbox_head.{index}."
        shapes |= with_biases(prefix, layers) | {f"{prefix}iof_tau": (4,)}
        shapes |= {f"{prefix}attention.attn.{k}": shape for k, shape in ATTENTION.items()}
    return {k: torch.randn(shape) for k, shape in shapes.items()}


def test_converted_adamixer_weights_fill_the_whole_model(tmp_path, convert):
    source, target = tmp_path / "published.pth", tmp_path / "converted.pth"
    published = published_adamixer(stages=3, logits=5)
    torch.save({"state_dict": published, "meta": {"epoch": 12}}, source)
    convert("adamixer", source, target)
    options = ["MODEL.DEVICE", "cpu", "MODEL.SparseRCNN.NUM_CLASSES", 5]
    model = build_model(read_cfg("quick/adamixer_shapes", options))
    Checkpointer(model, strict=True).load(str(target))
    stage, backbone = model.head.head_series[1], model.backbone
    prefix, mixing = "roi_head.bbox_head.1.", "roi_head.bbox_head.1.sampling_n_mixing."
    for parameter, key in (
        (stage.attention.attention.in_proj_weight, f"{prefix}attention.attn.in_proj_weight"),
        (stage.linear1.weight, f"{prefix}ffn.layers.0.0.weight"),
        (stage.adaptive_mixing.out_proj.weight, f"{mixing}adaptive_mixing.out_proj.weight"),
        (stage.mixing_norm.bias, f"{mixing}norm.bias"),
        (backbone.norm.weight, "neck.gn_out.weight"),
        (backbone.bottom_up.res3[0].shortcut.weight, "backbone.layer2.0.downsample.0.weight"),
    ):
        assert torch.equal(parameter, published[key]), key
    torch.save({"state_dict": {"roi_head.bbox_head.0.other": torch.zeros(1)}}, source)
    with pytest.raises(SystemExit, match=r"1 unknown parameters, .* roi_head\.bbox"):
        convert("adamixer", source, target)


def sampling(prefix):
    """Shapes of deformable attention: 4 heads, 4 levels, 4 points."""
    layers = [("sampling_offsets", 128, 64), ("attention_weights", 64, 64)]
    return with_biases(prefix, [*layers, ("value_proj", 64, 64), ("output_proj", 64, 64)])


def published_deformable_detr(stages, logits):
    """An official Deformable DETR checkpoint with box refinement (ResNet-18 instead of 50)."""
    shapes = {"transformer.level_embed": (4, 64), "query_embed.weight": (12, 128)}
    shapes |= with_biases("", [("transformer.reference_points", 2, 64)]) | resnet18(
        "backbone.0.body."
    )
    for index, (channels, size) in enumerate(((128, 1), (256, 1), (512, 1), (512, 3))):
        layers = [("0", 64, channels, size, size), ("1", 64)]
        shapes |= with_biases(f"input_proj.{index}.", layers)
    shared = [("linear1", 256, 64), ("linear2", 64, 256), ("norm1", 64), ("norm2", 64)]
    for index in range(2):
        prefix = f"transformer.encoder.layers.{index}."
        shapes |= sampling(f"{prefix}self_attn.") | with_biases(prefix, shared)
    for index in range(stages):
        prefix = f"transformer.decoder.layers.{index}."
        shapes |= sampling(f"{prefix}cross_attn.")
        shapes |= with_biases(prefix, [*shared, ("norm3", 64), ("self_attn.out_proj", 64, 64)])
        shapes |= {f"{prefix}self_attn.{k}": shape for k, shape in ATTENTION.items()}
        boxes = [(f"{index}.layers.{k}", n, 64) for k, n in ((0, 64), (1, 64), (2, 4))]
        shapes |= with_biases("class_embed.", [(index, logits, 64)])
        shapes |= with_biases("bbox_embed.", boxes)
        shapes |= with_biases("transformer.decoder.bbox_embed.", boxes)
    return {k: torch.randn(shape) for k, shape in shapes.items()}


# Parts of names of the official code, and those of mmdetection, by version.
IN_MMDETECTION = {
    2: [
        ("query_embed", "bbox_head.query_embedding"), ("level_embed", "level_embeds"),
        ("transformer.", "bbox_head.transformer."), ("cross_attn", "attentions.1"),
        ("linear1", "ffns.0.layers.0.0"), ("linear2", "ffns.0.layers.1"),
    ],
    3: [
        ("query_embed", "query_embedding"), ("transformer.", ""),
        ("reference_points", "reference_points_fc"), ("linear1", "ffn.layers.0.0"),
        ("linear2", "ffn.layers.1"), ("enc_output.", "memory_trans_fc."),
        ("enc_output_norm", "memory_trans_norm"), ("pos_trans.", "pos_trans_fc."),
    ],
}  # fmt: skip


def as_in_mmdetection(state, version):
    """The same tensors under the names of mmdetection, whose neck has no biases."""
    renamed = {}
    for key, value in state.items():
        if "decoder.bbox_embed" in key:
            continue
        of_decoder = "decoder" in key
        if "input_proj" in key:
            _, level, part, kind = key.split(".")
            if part == "0" and kind == "bias":
                continue
            stem = "neck.extra_convs.0" if level == "3" else f"neck.convs.{level}"
            renamed[f"{stem}.{'gn' if part == '1' else 'conv'}.{kind}"] = value
            continue
        if key.startswith("bbox_embed"):
            _, stage, _, layer, kind = key.split(".")
            renamed[f"bbox_head.reg_branches.{stage}.{2 * int(layer)}.{kind}"] = value
            continue
        both = [("class_embed", "bbox_head.cls_branches"), ("backbone.0.body.", "backbone.")]
        for old, new in both + IN_MMDETECTION[version]:
            key = key.replace(old, new)
        first = "attentions.0" if version == 2 else "self_attn"
        key = key.replace("self_attn", f"{first}.attn" if of_decoder else first)
        order = {"norm1": 1, "norm2": 0, "norm3": 2} if of_decoder else {"norm1": 0, "norm2": 1}
        for old, index in order.items():
            key = key.replace(old, f"norms.{index}")
        renamed[key] = value
    return renamed


each_code = pytest.mark.parametrize("version", [0, 2, 3], ids=["official", "mmdet 2", "mmdet 3"])


@each_code
def test_converted_weights_of_two_stages_fill_the_whole_model(version, tmp_path, convert):
    source, target = tmp_path / "published.pth", tmp_path / "converted.pth"
    official = published_deformable_detr(stages=4, logits=91)  # the last predicts candidates
    absent = ("transformer.decoder.layers.3", "transformer.reference_points", "query_embed")
    official = {k: v for k, v in official.items() if not k.startswith(absent)}
    layers = [("enc_output", 64, 64), ("enc_output_norm", 64)]
    layers += [("pos_trans", 128, 128), ("pos_trans_norm", 128)]
    shapes = with_biases("transformer.", layers)
    official |= {k: torch.randn(shape) for k, shape in shapes.items()}
    state = as_in_mmdetection(official, version) if version else official
    torch.save({"state_dict" if version else "model": state}, source)
    convert("deformable_detr", source, target)
    options = ["MODEL.DEVICE", "cpu", "MODEL.SparseRCNN.NUM_CLASSES", 80]
    options += ["MODEL.SparseRCNN.PROPOSALS.NAME", "EncoderQueries"]
    model = build_model(read_cfg("quick/deformable_detr_shapes", options))
    Checkpointer(model, strict=True).load(str(target))
    proposals = model.proposals
    assert torch.equal(proposals.class_embed.weight, official["class_embed.3.weight"][:1])
    assert torch.equal(proposals.bbox_embed[4].bias, official["bbox_embed.3.layers.2.bias"])
    assert torch.equal(proposals.pos_trans.weight, official["transformer.pos_trans.weight"])


@each_code
def test_converted_deformable_detr_weights_fill_the_whole_model(version, tmp_path, convert):
    source, target = tmp_path / "published.pth", tmp_path / "converted.pth"
    official = published_deformable_detr(stages=3, logits=91)
    if version:
        content = {"state_dict": as_in_mmdetection(official, version), "meta": {"epoch": 50}}
    else:
        content = {"model": official, "args": argparse.Namespace(lr=2e-4)}
    torch.save(content, source)
    convert("deformable_detr", source, target)
    options = ["MODEL.DEVICE", "cpu", "MODEL.SparseRCNN.NUM_CLASSES", 80]
    model = build_model(read_cfg("quick/deformable_detr_shapes", options))
    Checkpointer(model, strict=True).load(str(target))
    stage, layer, conv = model.head.head_series[1], model.encoder.layers[1], model.backbone.convs[3]
    prefix = "transformer.decoder.layers.1."
    for parameter, key in (
        (stage.self_attn.in_proj_weight, f"{prefix}self_attn.in_proj_weight"),
        (stage.cross_attn.sampling_offsets.bias, f"{prefix}cross_attn.sampling_offsets.bias"),
        (stage.norm1.weight, f"{prefix}norm1.weight"),
        (stage.norm2.weight, f"{prefix}norm2.weight"),
        (stage.bbox_embed[4].weight, "bbox_embed.1.layers.2.weight"),
        (layer.norm2.bias, "transformer.encoder.layers.1.norm2.bias"),
        (layer.linear2.weight, "transformer.encoder.layers.1.linear2.weight"),
        (conv.weight, "input_proj.3.0.weight"),
        (conv.norm.weight, "input_proj.3.1.weight"),
        (model.proposals.reference_points.weight, "transformer.reference_points.weight"),
    ):
        assert torch.equal(parameter, official[key]), key
    bias = official["input_proj.3.0.bias"]
    assert torch.equal(conv.bias, torch.zeros_like(bias) if version else bias)
    classes = official["class_embed.1.bias"]
    assert stage.class_embed.bias[[0, 79]].tolist() == classes[[1, 90]].tolist()  # person, last
    torch.save({"model": {"transformer.other": torch.zeros(1)}}, source)
    with pytest.raises(SystemExit, match="1 unknown parameters, such as transformer"):
        convert("deformable_detr", source, target)
    torch.save({"model": {"other.weight": torch.zeros(1)}}, source)
    with pytest.raises(SystemExit, match="1 unknown parameters, such as other"):
        convert("deformable_detr", source, target)


@pytest.mark.parametrize("tool", ["adamixer", "asag", "deformable_detr", "torchvision"])
def test_unreadable_and_untrusted_files_are_one_message(tool, tmp_path, convert):
    target = tmp_path / "converted.pth"
    with pytest.raises(SystemExit, match=r"none\.pth"):
        convert(tool, tmp_path / "none.pth", target)
    (tmp_path / "damaged.pth").write_bytes(b"no weights")
    with pytest.raises(SystemExit, match=r"damaged\.pth"):
        convert(tool, tmp_path / "damaged.pth", target)
    torch.save({"state_dict": {}, "meta": {"version": Fraction(1, 2)}}, tmp_path / "object.pth")
    with pytest.raises(SystemExit, match=r"Fraction.*--trust"):
        convert(tool, tmp_path / "object.pth", target)
    assert not target.exists()


def test_a_trusted_file_may_hold_objects_beside_its_weights(tmp_path, convert):
    source, target = tmp_path / "published.pth", tmp_path / "converted.pth"
    published = published_adamixer(stages=1, logits=5)
    torch.save({"state_dict": published, "meta": {"version": Fraction(1, 2)}}, source)
    convert("adamixer", source, target, "--trust")
    features = torch.load(target)["model"]["init_proposal_features.weight"]
    assert torch.equal(features, published["rpn_head.init_content_features.weight"])


def towers(cls, reg, logits, deltas, classes):
    """Shapes of the towers and predictions of a stage."""
    layers = ((cls, (0,)), (reg, (0, 3, 6)))
    shapes = {f"{tower}.{i}.weight": (64, 64) for tower, indices in layers for i in indices}
    norms = [(f"{tower}.{i + 1}", 64) for tower, indices in layers for i in indices]
    return shapes | with_biases("", [*norms, (logits, classes, 64), (deltas, 4, 64)])


def stage_of_asag(kind, classes):
    """Shapes of a decoder of ASAG-A or ASAG-S."""
    if kind == "a":
        layers = [*MIXING, ("attention.out_proj", 64, 64)]
        layers += [("ffn.layers.0", 256, 64), ("ffn.layers.1", 64, 256)]
        shapes = {f"attention.{k}": v for k, v in ATTENTION.items()} | {"iof_tau": (4,)}
        shapes |= towers("cls_fcs", "reg_fcs", "fc_cls", "fc_reg", classes)
    else:
        layers = [("self_attn.out_proj", 64, 64), ("linear1", 256, 64), ("linear2", 64, 256)]
        layers += [(f"norm{i}", 64) for i in (1, 2, 3)]
        layers += [(f"inst_interact.norm{i}", size) for i, size in ((1, 16), (2, 64), (3, 64))]
        layers += [("inst_interact.dynamic_layer", 2 * 64 * 16, 64)]
        layers += [("inst_interact.out_layer", 64, 49 * 64)]
        shapes = {f"self_attn.{k}": v for k, v in ATTENTION.items()}
        shapes |= towers("cls_module", "reg_module", "class_logits", "bboxes_delta", classes)
    return shapes | with_biases("", layers)


def published_asag(kind, classes):
    """An official ASAG checkpoint of the size of the quick configs."""
    shapes = resnet18("backbone.0.body.")
    shapes = {k: v for k, v in shapes.items() if not k.endswith("num_batches_tracked")}
    channels = enumerate((64, 128, 256, 512))
    layers = [(f"inner_blocks.{i}", 64, c, 1, 1) for i, c in channels]
    layers += [(f"layer_blocks.{i}.0", 64, 64, 3, 3) for i in range(4)]  # torchvision's new names
    shapes |= with_biases("neck.", layers)
    layers = [(f"compress.{i}.0", 32, 64, 1, 1) for i in range(3)]
    layers += [(f"compress.{i}.2", 8, 32, 3, 3) for i in range(3)]
    for name, outputs in (("proj_all", 100), ("proj_patch", 50)):
        sizes = enumerate(((256, 1800), (256, 256), (outputs, 256)))
        layers += [(f"{name}.layers.{i}", *size) for i, size in sizes]
    shapes |= with_biases("anchor_generator.", [*layers, ("P6", 8, 8, 3, 3)])
    for key in ("layernorm.{}.weight", "layernorm.{}.bias", "pos_embedding.{}.weight"):
        shapes |= {f"anchor_generator.{key.format(i)}": (225, 8) for i in range(3)}
    layers = [("roi", 64, 64 * 49), *((f"tokens_norm{i}", 64) for i in (1, 2, 3))]
    layers += [("tokens_proj.layers.0", 256, 64), ("tokens_proj.layers.1", 64, 256)]
    shapes |= with_biases("rpn.", [*layers, ("attn.out_proj", 64, 64)])
    shapes |= {f"rpn.attn.{k}": v for k, v in ATTENTION.items()} | {"rpn.iof_tau": (4,)}
    initial = towers("cls_fcs", "reg_fcs", "fc_cls", "fc_reg", classes)
    shapes |= {f"rpn.{k}": v for k, v in initial.items()}
    shapes["decoder.decoder_embedding.weight"] = (4, 64)
    series = "decoder.bbox_head" if kind == "a" else "decoder.head_series"
    for i in range(4):
        shapes |= {f"{series}.{i}.{k}": v for k, v in stage_of_asag(kind, classes).items()}
    state = {key: 0.05 * torch.randn(shape) for key, shape in shapes.items()}
    return {k: torch.ones_like(v) if k.endswith("running_var") else v for k, v in state.items()}


@pytest.mark.parametrize("kind", ["a", "s"])
def test_converted_asag_weights_fill_the_whole_model_and_can_be_reduced_to_one_decoder(
    tmp_path, convert, kind
):
    source, target, one = (tmp_path / f"{x}.pth" for x in ("published", "converted", "one"))
    published = published_asag(kind, classes=5)
    options = argparse.Namespace(lr=1e-4, decoder=kind)
    torch.save({"model": published, "args": options, "epoch": 11}, source)
    convert("asag", source, target)
    opts = ["MODEL.DEVICE", "cpu", "MODEL.SparseRCNN.NUM_CLASSES", 5, "MODEL.ASAG.USED_HEAD", 2]
    config = f"quick/asag_{kind}_shapes"
    model = build_model(read_cfg(config, opts)).eval()
    Checkpointer(model, strict=True).load(str(target))
    assert model.iteration > model.guided_iterations
    stage = model.decoders.stages[3]
    for parameter, key in (
        (model.initializer.roi_norm.weight, "rpn.tokens_norm1.weight"),
        (model.backbone.fpn_output4.weight, "neck.layer_blocks.2.0.weight"),
        (stage.mixing_norm.weight, "decoder.bbox_head.3.sampling_n_mixing.norm.weight")
        if kind == "a"
        else (stage.inst_interact.norm3.bias, "decoder.head_series.3.inst_interact.norm3.bias"),
    ):
        assert torch.equal(parameter, published[key]), key
    opts += ["MODEL.ASAG.NUM_DECODERS", 1]
    inputs = batch([(96, 96)], [0])
    with torch.no_grad():
        expected = model.raw_predictions(inputs)[0].logits
    for file in (source, target):  # the published file and the converted one
        convert("asag", file, one, "--head", 2)
        small = build_model(read_cfg(config, opts)).eval()
        Checkpointer(small, strict=True).load(str(one))
        with torch.no_grad():
            torch.testing.assert_close(small.raw_predictions(inputs)[0].logits, expected)
    with pytest.raises(SystemExit, match="decoders 0 to 3"):
        convert("asag", source, one, "--head", 4)
    torch.save({"model": {"rpn.other": torch.zeros(1)}}, source)
    with pytest.raises(SystemExit, match=r"1 unknown parameters, such as rpn\.other"):
        convert("asag", source, one)
