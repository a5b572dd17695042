"""Converters of other projects' checkpoints, on state dicts of their names and shapes."""

import argparse
import runpy
import sys
from fractions import Fraction

import pytest
import torch
import torchvision
from conftest import REPOSITORY, batch
from detectron2.modeling import build_model

from dsrcnn.config import read_cfg
from dsrcnn.engine.checkpoint import ReportingCheckpointer

TOOLS = REPOSITORY / "tools"


@pytest.fixture
def convert(monkeypatch):
    """Runs a tool in this process, which has imported what it needs."""
    monkeypatch.syspath_prepend(str(TOOLS))

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(TOOLS / f"{name}.py"), run_name="__main__")

    return run


def theirs_of_adamixer(stages, logits):
    """Names and shapes of an official AdaMixer checkpoint (ResNet-18 instead of 50)."""
    shapes = {}
    for key, value in torchvision.models.resnet18().state_dict().items():
        if not key.startswith("fc."):
            shapes[f"backbone.{key}"] = tuple(value.shape)
    for index, channels in enumerate((64, 128, 256, 512)):
        shapes[f"neck.lateral_convs.{index}.conv.weight"] = (64, channels, 1, 1)
        shapes[f"neck.lateral_convs.{index}.conv.bias"] = (64,)
    shapes |= {"neck.gn_out.weight": (64,), "neck.gn_out.bias": (64,)}
    shapes |= {"rpn_head.init_proposal_bboxes.weight": (12, 4)}
    shapes |= {"rpn_head.init_content_features.weight": (12, 64)}
    stage = {
        "attention.attn.in_proj_weight": (192, 64), "attention.attn.in_proj_bias": (192,),
        "attention.attn.out_proj.weight": (64, 64), "attention.attn.out_proj.bias": (64,),
        "attention_norm.weight": (64,), "attention_norm.bias": (64,), "iof_tau": (4,),
        "ffn.layers.0.0.weight": (256, 64), "ffn.layers.0.0.bias": (256,),
        "ffn.layers.1.weight": (64, 256), "ffn.layers.1.bias": (64,),
        "ffn_norm.weight": (64,), "ffn_norm.bias": (64,),
        "sampling_n_mixing.sampling_offset_generator.0.weight": (4 * 8 * 3, 64),
        "sampling_n_mixing.sampling_offset_generator.0.bias": (4 * 8 * 3,),
        "sampling_n_mixing.adaptive_mixing.parameter_generator.0.weight": (4 * 384, 64),
        "sampling_n_mixing.adaptive_mixing.parameter_generator.0.bias": (4 * 384,),
        "sampling_n_mixing.adaptive_mixing.out_proj.weight": (64, 4 * 16 * 16),
        "sampling_n_mixing.adaptive_mixing.out_proj.bias": (64,),
        "sampling_n_mixing.norm.weight": (64,), "sampling_n_mixing.norm.bias": (64,),
        "fc_cls.weight": (logits, 64), "fc_cls.bias": (logits,),
        "fc_reg.weight": (4, 64), "fc_reg.bias": (4,),
    }  # fmt: skip
    for tower in ("cls_fcs", "reg_fcs"):
        stage |= {f"{tower}.0.weight": (64, 64), f"{tower}.0.bias": (64,)}
        stage |= {f"{tower}.1.weight": (64,), f"{tower}.1.bias": (64,)}
    for index in range(stages):
        shapes |= {f"roi_head.bbox_head.{index}.{k}": shape for k, shape in stage.items()}
    return {k: torch.randn(shape) for k, shape in shapes.items()}


def test_converted_adamixer_weights_fill_the_whole_model(tmp_path, convert):
    source, target = tmp_path / "theirs.pth", tmp_path / "ours.pth"
    theirs = theirs_of_adamixer(stages=3, logits=5)
    torch.save({"state_dict": theirs, "meta": {"epoch": 12}}, source)
    convert("convert_adamixer", source, target)
    options = ["MODEL.DEVICE", "cpu", "MODEL.SparseRCNN.NUM_CLASSES", 5]
    model = build_model(read_cfg("quick/adamixer_shapes", options))
    ReportingCheckpointer(model, strict=True).load(str(target))
    stage = model.head.head_series[1]
    prefix, mixing = "roi_head.bbox_head.1.", "sampling_n_mixing"
    for ours, key in (
        (stage.attention.attention.in_proj_weight, "attention.attn.in_proj_weight"),
        (stage.linear1.weight, "ffn.layers.0.0.weight"),
        (
            stage.adaptive_mixing.out_proj.weight,
            "sampling_n_mixing.adaptive_mixing.out_proj.weight",
        ),
        (stage.mixing_norm.bias, f"{mixing}.norm.bias"),
    ):
        assert torch.equal(ours, theirs[prefix + key]), key
    assert torch.equal(model.backbone.norm.weight, theirs["neck.gn_out.weight"])
    assert torch.equal(
        model.backbone.bottom_up.res3[0].shortcut.weight,
        theirs["backbone.layer2.0.downsample.0.weight"],
    )
    torch.save({"state_dict": {"roi_head.bbox_head.0.other": torch.zeros(1)}}, source)
    with pytest.raises(SystemExit, match=r"1 unknown parameters, .* roi_head\.bbox"):
        convert("convert_adamixer", source, target)


@pytest.mark.parametrize("tool", ["convert_adamixer", "convert_asag"])
def test_files_that_cannot_be_read_or_trusted_are_one_message(tool, tmp_path, convert):
    target = tmp_path / "ours.pth"
    with pytest.raises(SystemExit, match=r"none\.pth"):
        convert(tool, tmp_path / "none.pth", target)
    torch.save({"state_dict": {}, "meta": {"version": Fraction(1, 2)}}, tmp_path / "object.pth")
    with pytest.raises(SystemExit, match=r"Fraction.*--trust"):
        convert(tool, tmp_path / "object.pth", target)
    assert not target.exists()


def test_adamixer_with_objects_beside_its_weights_is_read_if_trusted(tmp_path, convert):
    source, target = tmp_path / "theirs.pth", tmp_path / "ours.pth"
    theirs = theirs_of_adamixer(stages=1, logits=5)
    torch.save({"state_dict": theirs, "meta": {"version": Fraction(1, 2)}}, source)
    convert("convert_adamixer", source, target, "--trust")
    features = torch.load(target)["model"]["init_proposal_features.weight"]
    assert torch.equal(features, theirs["rpn_head.init_content_features.weight"])


def theirs_of_asag(kind, classes):
    """Names and shapes of an official ASAG checkpoint, of the size of the quick configs."""
    shapes = {}
    for key, value in torchvision.models.resnet18().state_dict().items():
        if not key.startswith("fc.") and not key.endswith("num_batches_tracked"):
            shapes[f"backbone.0.body.{key}"] = tuple(value.shape)

    def add(prefix, key, *shape):
        shapes[f"{prefix}{key}.weight"], shapes[f"{prefix}{key}.bias"] = shape, shape[:1]

    for i, channels in enumerate((64, 128, 256, 512)):
        add("neck.", f"inner_blocks.{i}", 64, channels, 1, 1)
        add("neck.", f"layer_blocks.{i}.0", 64, 64, 3, 3)  # as newer torchvision names it
    for i in range(3):
        add("anchor_generator.", f"compress.{i}.0", 32, 64, 1, 1)
        add("anchor_generator.", f"compress.{i}.2", 8, 32, 3, 3)
        for part in ("layernorm.{}.weight", "layernorm.{}.bias", "pos_embedding.{}.weight"):
            shapes[f"anchor_generator.{part.format(i)}"] = (225, 8)
    add("anchor_generator.", "P6", 8, 8, 3, 3)
    for name, outputs in (("proj_all", 100), ("proj_patch", 50)):
        for i, shape in enumerate(((256, 1800), (256, 256), (outputs, 256))):
            add("anchor_generator.", f"{name}.layers.{i}", *shape)
    attention = {"in_proj_weight": (192, 64), "in_proj_bias": (192,)}

    def towers(prefix, cls, reg, logits, deltas):
        for tower, layers in ((cls, (0,)), (reg, (0, 3, 6))):
            for i in layers:
                shapes[f"{prefix}{tower}.{i}.weight"] = (64, 64)
                add(prefix, f"{tower}.{i + 1}", 64)
        add(prefix, logits, classes, 64)
        add(prefix, deltas, 4, 64)

    add("rpn.", "roi", 64, 64 * 49)
    for i in (1, 2, 3):
        add("rpn.", f"tokens_norm{i}", 64)
    add("rpn.", "tokens_proj.layers.0", 256, 64)
    add("rpn.", "tokens_proj.layers.1", 64, 256)
    shapes |= {f"rpn.attn.{k}": v for k, v in attention.items()} | {"rpn.iof_tau": (4,)}
    add("rpn.", "attn.out_proj", 64, 64)
    towers("rpn.", "cls_fcs", "reg_fcs", "fc_cls", "fc_reg")
    shapes["decoder.decoder_embedding.weight"] = (4, 64)
    for k in range(4):
        if kind == "a":
            prefix = f"decoder.bbox_head.{k}."
            shapes |= {f"{prefix}attention.{key}": v for key, v in attention.items()}
            shapes[f"{prefix}iof_tau"] = (4,)
            mixing = "sampling_n_mixing."
            for key, *shape in (
                ("attention.out_proj", 64, 64), ("attention_norm", 64), ("ffn_norm", 64),
                ("ffn.layers.0", 256, 64), ("ffn.layers.1", 64, 256), (f"{mixing}norm", 64),
                (f"{mixing}sampling_offset_generator.0", 4 * 8 * 3, 64),
                (f"{mixing}adaptive_mixing.parameter_generator.0", 4 * 384, 64),
                (f"{mixing}adaptive_mixing.out_proj", 64, 4 * 16 * 16),
            ):  # fmt: skip
                add(prefix, key, *shape)
            towers(prefix, "cls_fcs", "reg_fcs", "fc_cls", "fc_reg")
        else:
            prefix = f"decoder.head_series.{k}."
            shapes |= {f"{prefix}self_attn.{key}": v for key, v in attention.items()}
            interact = "inst_interact."
            for key, *shape in (
                ("self_attn.out_proj", 64, 64), ("linear1", 256, 64), ("linear2", 64, 256),
                ("norm1", 64), ("norm2", 64), ("norm3", 64),
                (f"{interact}dynamic_layer", 2 * 64 * 16, 64), (f"{interact}norm1", 16),
                (f"{interact}norm2", 64), (f"{interact}norm3", 64),
                (f"{interact}out_layer", 64, 49 * 64),
            ):  # fmt: skip
                add(prefix, key, *shape)
            towers(prefix, "cls_module", "reg_module", "class_logits", "bboxes_delta")
    found = {key: 0.05 * torch.randn(shape) for key, shape in shapes.items()}
    return {k: torch.ones_like(v) if k.endswith("running_var") else v for k, v in found.items()}


@pytest.mark.parametrize("kind", ["a", "s"])
def test_converted_asag_weights_fill_the_whole_model_and_one_decoder_can_be_kept(
    tmp_path, convert, kind
):
    source, target, one = (tmp_path / f"{x}.pth" for x in ("theirs", "ours", "one"))
    theirs = theirs_of_asag(kind, classes=5)
    options = argparse.Namespace(lr=1e-4, decoder=kind)
    torch.save({"model": theirs, "args": options, "epoch": 11}, source)
    convert("convert_asag", source, target)
    opts = ["MODEL.DEVICE", "cpu", "MODEL.SparseRCNN.NUM_CLASSES", 5, "MODEL.ASAG.USED_HEAD", 2]
    config = f"quick/asag_{kind}_shapes"
    model = build_model(read_cfg(config, opts)).eval()
    ReportingCheckpointer(model, strict=True).load(str(target))
    assert model.iteration > model.guided_iterations
    assert torch.equal(model.initializer.roi_norm.weight, theirs["rpn.tokens_norm1.weight"])
    assert torch.equal(model.backbone.fpn_output4.weight, theirs["neck.layer_blocks.2.0.weight"])
    stage = model.decoders.stages[3]
    if kind == "a":
        expected = theirs["decoder.bbox_head.3.sampling_n_mixing.norm.weight"]
        assert torch.equal(stage.mixing_norm.weight, expected)
    else:
        expected = theirs["decoder.head_series.3.inst_interact.norm3.bias"]
        assert torch.equal(stage.inst_interact.norm3.bias, expected)
    # The published file cut to a decoder, and the converted one.
    opts += ["MODEL.ASAG.NUM_DECODERS", 1, "MODEL.ASAG.USED_HEAD", 0]
    inputs = batch([(96, 96)], [0])
    with torch.no_grad():
        whole = model.predict(inputs)[0].logits
    for file in (source, target):
        convert("convert_asag", file, one, "--head", 2)
        small = build_model(read_cfg(config, opts)).eval()
        ReportingCheckpointer(small, strict=True).load(str(one))
        with torch.no_grad():
            torch.testing.assert_close(small.predict(inputs)[0].logits, whole)
    with pytest.raises(SystemExit, match="decoders 0 to 3"):
        convert("convert_asag", source, one, "--head", 4)
    torch.save({"model": {"rpn.other": torch.zeros(1)}}, source)
    with pytest.raises(SystemExit, match=r"1 unknown parameters, such as rpn\.other"):
        convert("convert_asag", source, one)
    source.write_bytes(b"no weights")
    with pytest.raises(SystemExit, match=r"theirs\.pth"):
        convert("convert_asag", source, one)
