"""``dsrcnn analyze``: costs by part, against counts by hand."""

import re
from itertools import repeat

import pytest
import torch
from conftest import TINY, refusal
from detectron2.modeling import build_model
from torch import nn
from torchvision.ops import deform_conv2d

from dsrcnn.analysis.complexity import (
    OTHER,
    amounts_by_part,
    build_loop,
    count_multiply_adds,
    count_parameters,
    find_parts,
    load_bare_cfg,
    measure_saved_bytes,
    random_inputs,
)
from dsrcnn.cli.main import main
from dsrcnn.engine.train_loop import TrainLoop

R50 = "coco/sparse_rcnn_R50_300pro_3x"
NODE = "MODEL.SparseRCNN"


def bare(config, *opts):
    return load_bare_cfg(config, ["MODEL.DEVICE", "cpu", *opts])[0]


def saved_bytes(*opts):
    """Bytes kept by part of a tiny Sparse R-CNN for two images."""
    cfg = bare(R50, *TINY, *opts)
    model = build_model(cfg)
    loop = build_loop(cfg, model, random_inputs(cfg, (64, 96), images=2))
    return measure_saved_bytes(loop, find_parts(model))


class Chain(nn.Module):
    """Layers as parts of a model; the loss is the mean."""

    def __init__(self, **layers):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, inputs):
        x = inputs[0]
        for layer in self.children():
            x = layer(x)
        return {"loss": x.mean()}


def multiply_adds(x, **layers):
    model = Chain(**layers)
    return count_multiply_adds(model, find_parts(model), [x])


def test_parameters_are_those_of_the_official_model():
    model = build_model(bare(R50))
    counts = count_parameters(model, find_parts(model))
    stages = {name: all_ for name, (all_, _) in counts.items() if "stage" in name}
    assert list(stages) == [f"head, stage {number}" for number in range(1, 7)]
    assert sum(stages.values()) == 79_412_472
    assert counts["proposals"] == (300 * (256 + 4),) * 2
    assert sum(trainable for _, trainable in counts.values()) == 106_067_368
    frozen = 7 * 7 * 3 * 64 + 3 * 9 * 64**2 + (64 + 2 * 256 + 256) * 64 + 3 * 64 * 256
    assert counts["backbone"][0] - counts["backbone"][1] == frozen  # stem and res2
    assert counts[OTHER] == (0, 0)


def test_shared_parameters_are_counted_once():
    layer = nn.Linear(3, 4)
    model = Chain(first=layer, second=nn.Sequential(layer, nn.Linear(4, 3, bias=False)))
    counts = count_parameters(model, find_parts(model))
    assert counts == {"first": (16, 16), "second": (12, 12), OTHER: (0, 0)}


def test_multiply_adds_of_layers_are_counted_by_hand():
    x = torch.ones(1, 4, 10, 12)
    plain, grouped = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 6, 3, stride=2, groups=2)
    counts = multiply_adds(x, plain=plain, norm=nn.BatchNorm2d(8), grouped=grouped)
    assert counts["plain"] == 8 * (10 * 12) * 4 * 9
    assert counts["norm"] == 0
    assert counts["grouped"] == 6 * (4 * 5) * 4 * 9  # half of the 8 input channels
    assert multiply_adds(torch.ones(5, 4), linear=nn.Linear(4, 3))["linear"] == 5 * 4 * 3


def test_multiply_adds_of_deformable_convolutions_are_those_of_plain_ones():
    class Deformable(nn.Module):
        def forward(self, x):
            return deform_conv2d(x, torch.zeros(1, 18, 8, 10), torch.ones(6, 4, 3, 3))

    counts = multiply_adds(torch.ones(1, 4, 10, 12), layer=Deformable())
    assert counts["layer"] == 6 * (8 * 10) * 4 * 9


def test_multiply_adds_of_distinct_proposals_are_those_of_their_towers_and_outputs():
    cfg = bare(R50, *TINY, "MODEL.SparseRCNN.PROPOSALS.NAME", "DenseDistinct")
    model = build_model(cfg)
    counts = count_multiply_adds(model, find_parts(model), random_inputs(cfg, (64, 96), images=1))
    locations, channels, classes = 8 * 12 + 4 * 6 + 2 * 3, 32, 5
    layer = 9 * channels + channels**2
    expected = locations * (4 * layer + channels * (classes + 4))
    expected += 8 * 2 * channels**2  # the projection of the proposals; NMS on a CPU has none
    assert counts["proposals"] == expected


@pytest.mark.parametrize("fused", [False, True])
def test_multiply_adds_of_attention_are_counted_whether_it_is_fused_or_not(fused):
    class Attention(nn.MultiheadAttention):
        def forward(self, x):
            return super().forward(x, x, x, need_weights=not fused)[0]

    length, width = 7, 16
    counts = multiply_adds(torch.ones(1, length, width), layer=Attention(16, 4, batch_first=True))
    assert counts["layer"] == 4 * length * width**2 + 2 * length**2 * width


def test_multiply_adds_of_a_stage_are_counted_by_hand():
    model = build_model(bare(R50, *TINY))
    inputs = random_inputs(bare(R50, *TINY), (64, 96), images=1)
    counts = count_multiply_adds(model, find_parts(model), inputs)
    rows, channels, dynamic, hidden, classes, cells = 8, 32, 8, 64, 5, 49
    attention = 4 * rows * channels**2 + 2 * rows**2 * channels
    generated = rows * channels * (2 * channels * dynamic)
    interaction = rows * 2 * cells * channels * dynamic + rows * cells * channels**2
    feed_forward = 2 * rows * channels * hidden
    boxes = 3 * rows * channels**2 + 4 * rows * channels
    scores = rows * channels**2 + rows * channels * classes  # of the last stage only
    expected = attention + generated + interaction + feed_forward + boxes
    assert counts["head, stage 1"] == expected
    assert counts["head, stage 2"] == expected + scores
    assert counts["head, rest"] == counts["proposals"] == counts[OTHER] == 0
    # An image of 64 x 96 pixels: 1 x 1 convolutions of res2 to res5, 3 x 3 ones of p2 to p5.
    cells = (16 * 24, 8 * 12, 4 * 6, 2 * 3)
    lateral = sum(c * width for c, width in zip(cells, (64, 128, 256, 512), strict=True))
    assert counts["neck"] == channels * (lateral + sum(cells) * 9 * channels)


def test_what_is_kept_for_the_backward_pass_is_counted_once():
    layers = {"first": nn.Linear(4, 5), "sigmoid": nn.Sigmoid(), "second": nn.Linear(5, 2)}
    model = Chain(**layers)
    options = {"clip_norm": 1.0, "norm_type": 2.0, "seed": 0, "accumulate": 1}
    options |= {"device": torch.device("cpu"), "precision": torch.float32}
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    loop = TrainLoop(model, repeat([torch.ones(3, 4)]), optimizer, **options)
    loop.iter = 0
    # The input, the result of the sigmoid, which is also the second layer's input; no parameters.
    expected = {"first": 3 * 4 * 4, "sigmoid": 3 * 5 * 4, "second": 0, OTHER: 0}
    assert measure_saved_bytes(loop, find_parts(model)) == expected


def test_checkpointed_stages_and_backbone_keep_less_and_recollection_keeps_more():
    plain = saved_bytes()
    checkpointed = saved_bytes("MODEL.ACTIVATION_CHECKPOINT", "('backbone','stages')")
    assert checkpointed["backbone"] < plain["backbone"] / 2
    assert checkpointed["head, stage 2"] < plain["head, stage 2"] / 2
    recollecting = saved_bytes(f"{NODE}.SQR.ENABLED", "True")
    assert recollecting["head, stage 1"] == plain["head, stage 1"]
    assert recollecting["head, stage 2"] > 1.9 * plain["head, stage 2"]  # two groups


def test_amounts_belong_to_the_innermost_part():
    meter = {"value": 0}

    class Inner(nn.Module):
        def forward(self, x):
            meter["value"] += 10
            return x

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def forward(self, x):
            meter["value"] += 1
            x = self.inner(self.inner(x))
            meter["value"] += 2
            return x

    outer = Outer()
    with amounts_by_part({"inner": outer.inner, "outer": outer}, lambda: meter["value"]) as amounts:
        outer(torch.ones(1))
        meter["value"] += 100
    assert amounts == {"inner": 20, "outer": 3, OTHER: 100}
    assert not outer._forward_hooks
    assert not outer.inner._forward_pre_hooks


@pytest.mark.parametrize(("config", "parts"), [
    ("sparse_rcnn", ["backbone", "neck", "proposals", "head, stage 1", "head, stage 3"]),
    ("dynamic_sparse_rcnn_sqr", ["backbone", "neck", "proposals", "head, stage 3", "head, rest"]),
    ("adamixer", ["backbone", "neck", "proposals", "head, stage 1", "head, stage 3"]),
    ("asag_a", ["backbone", "neck", "generator", "initializer", "decoders, stage 4"]),
    ("dynamic_rcnn", ["backbone", "neck", "proposal_generator", "roi_heads"]),
])  # fmt: skip
def test_all_architectures_are_analyzed_without_data(config, parts, capsys):
    arguments = ["analyze", "--config-file", f"quick/{config}_shapes", "--size", "64", "96"]
    arguments += ["--images", "2", "--repeats", "1", "MODEL.DEVICE", "cpu"]
    assert main([*arguments, "DATASETS.CUSTOM.FOLDER", "nothing"]) == 0
    printed = capsys.readouterr().out
    rows = dict(re.findall(r"^(\w.*?)  +([\d,]+ .*)$", printed, re.MULTILINE))
    assert set(parts) < set(rows)
    columns = [[float(x.replace(",", "")) for x in row.split()] for row in rows.values()]
    *sums, total = zip(*columns, strict=True)
    for values in (*sums, total):
        assert sum(values[:-1]) == pytest.approx(values[-1], abs=0.06 * len(values))
    assert list(rows)[-1] == "total"
    assert "2 images of 64 x 96 pixels" in printed
    assert "training step: " in printed
    assert "NUM_CLASSES is 0; 80 classes are assumed" in printed
    assert ("trained weights change them" in printed) == (config in ("asag_a", "dynamic_rcnn"))


def test_a_run_folder_needs_no_weights(tmp_path, capsys):
    cfg = bare("quick/sparse_rcnn_shapes", *TINY, "INPUT.MIN_SIZE_TEST", 64)
    cfg.MODEL.WEIGHTS = "nothing.pth"
    (tmp_path / "config.yaml").write_text(cfg.dump())
    assert main(["analyze", str(tmp_path), "INPUT.MAX_SIZE_TEST", "96", "--repeats", "1"]) == 0
    printed = capsys.readouterr().out
    assert "SparseRCNN, random weights, 1 image of 64 x 96 pixels" in printed
    assert "assumed" not in printed


def test_classes_of_a_run_replace_the_assumed_number():
    classes = ["DATASETS.CUSTOM.CLASSES", "('cell','platelet')", f"{NODE}.NUM_CLASSES", "0"]
    cfg, notes = load_bare_cfg("quick/sparse_rcnn_shapes", ["MODEL.COMPILE", "True", *classes])
    assert cfg.MODEL.SparseRCNN.NUM_CLASSES == 2
    assert notes[0] == f"{NODE}.NUM_CLASSES is 0; 2 classes are assumed."
    assert "MODEL.COMPILE" in notes[1]


def test_masks_are_made_for_models_with_mask_heads():
    cfg = bare("dynamic_rcnn/mask_rcnn_dynamic_R_50_FPN_1x")
    instances = random_inputs(cfg, (40, 60), images=1)[0]["instances"]
    boxes = instances.gt_masks.get_bounding_boxes().tensor
    torch.testing.assert_close(boxes, instances.gt_boxes.tensor)
    cfg.INPUT.MASK_FORMAT = "bitmask"
    instances = random_inputs(cfg, (40, 60), images=1)[0]["instances"]
    assert instances.gt_masks.tensor.shape == (7, 40, 60)


@pytest.mark.parametrize(("words", "message"), [
    (["analyze"], "write RUN"),
    (["analyze", "--config-file", R50, "--size", "64"], "expected 2 arguments"),
    (["analyze", "--config-file", R50, "--size", "0", "64"], "'0' is not a number"),
    (["analyze", "--config-file", R50, "INPUT.MIN_SIZE_TEST", "0"], "Write --size HEIGHT WIDTH"),
    (["analyze", "--config-file", R50, "MODEL.KEYPOINT_ON", "True"], "KEYPOINT_ON False"),
    (["analyze", "--config-file", R50, "MODEL.DEVISE", "cpu"], "Did you mean MODEL.DEVICE"),
])  # fmt: skip
def test_invalid_input_is_one_message(words, message, capsys):
    assert message in refusal(capsys, *words)
