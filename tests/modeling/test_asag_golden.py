"""ASAG's generator, initializer and decoders against numbers of the published code."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import REPOSITORY

from dsrcnn.modeling.asag.anchor_generator import AnchorGenerator, ProbingRule
from dsrcnn.modeling.asag.criterion import ASAGCriterion
from dsrcnn.modeling.asag.queries import (
    STAGE_OPTIONS,
    AdaMixerDecoders,
    QueryInitializer,
    RCNNDecoders,
    attention_mask,
)
from dsrcnn.modeling.decoder import AdaMixerStage, RCNNHead, RoIFeatures, StageSettings
from dsrcnn.structures import Predictions, Targets, TermWeights, box_cxcywh_to_xyxy, boxes_to_xyzr

sys.path.insert(0, str(REPOSITORY / "tests/golden"))
from asag_fill import feature, fill, parameter

SIZES = torch.tensor([[320.0, 256, 320, 256], [288, 240, 288, 240]])
STRIDES = (4, 8, 16, 32)
ROIS = RoIFeatures(strides=STRIDES, aligned=False)
SETTINGS = StageSettings(256, 80, 8, 2048, 1, 3, "gelu")
_BOXES = [[100, 80, 60, 40], [100, 80, 64, 48], [200, 150, 150, 120], [160, 128, 320, 256]]
BOXES = torch.tensor([*_BOXES, [30, 30, 20, 20]]).float()
INITIALIZER = [
    ("tokens_norm1", "roi_norm"), ("tokens_norm3", "attention.norm"), ("tokens_norm2", "ffn_norm"),
    ("attn.", "attention.attention."), ("iof_tau", "attention.iof_tau"),
    ("tokens_proj.layers.0", "linear1"), ("tokens_proj.layers.1", "linear2"),
]  # fmt: skip
MIXING = "sampling_n_mixing."
ADAMIXER = [
    ("attention_norm", "attention.norm"), ("iof_tau", "attention.iof_tau"),
    ("attention.", "attention.attention."), ("ffn.layers.0", "linear1"),
    ("ffn.layers.1", "linear2"), (f"{MIXING}norm", "mixing_norm"),
    (f"{MIXING}sampling_offset_generator.0", "sampling_offset_generator"),
    (f"{MIXING}adaptive_mixing.parameter_generator.0", "adaptive_mixing.parameter_generator"),
    (f"{MIXING}adaptive_mixing.out_proj", "adaptive_mixing.out_proj"),
]  # fmt: skip


def assert_close(actual, expected, tolerance=1e-4):
    torch.testing.assert_close(actual.float(), torch.tensor(expected), rtol=tolerance, atol=1e-4)


def relative(boxes):
    """xyxy in pixels to cxcywh as fractions of the images."""
    low, high = boxes.split(2, dim=-1)
    return torch.cat([(low + high) / 2, high - low], dim=-1) / SIZES.unsqueeze(1)


@pytest.fixture(scope="module")
def generated():
    sizes = {"channels": 256, "hidden": 1000, "fixed_anchors": 50, "probed_anchors": 20}
    generator = fill(AnchorGenerator(**sizes, rule=ProbingRule()), "anchor_generator.")
    features = [feature(level) for level in (3, 4, 5)]
    with torch.no_grad():
        return generator, features, generator(features, SIZES)


@torch.no_grad()
def test_compressed_fixed_and_probed_levels(generated):
    generator, features, (_, fixed, (first, second)) = generated
    means = [net(x).abs().mean() for net, x in zip(generator.compress, features, strict=True)]
    assert_close(torch.stack(means), [0.735393, 0.702964, 0.654807])
    assert_close(fixed.whole.sum(), 206.2663)
    assert_close(fixed.whole[0, 0, 0, :4], [0.95248, 0.69316, 0.82448, 0.85548])
    assert_close(fixed.quarters.sum(), 894.0739)
    assert_close(fixed.quarters[0, 0, 0, :4], [0.83876, 0.87674, 0.99283, 0.83787])
    assert (first.stride, second.stride) == (16, 8)
    assert first.images.tolist() == [0, 1, 1, 0, 1, 0, 0, 1, 0, 0]
    assert first.positions[:5].tolist() == [[2, 1], [3, 0], [3, 0], [0, 0], [0, 0]]
    assert_close(first.predictions.sum(), 393.944)
    assert second.images.tolist() == [0, 0, 0]
    assert second.positions.tolist() == [[0, 5], [1, 17], [13, 17]]
    assert_close(second.predictions.sum(), 135.717)


def test_anchors(generated):
    anchors = generated[2][0]
    assert anchors.mask.sum(dim=1).tolist() == [200, 200]
    assert_close(anchors.boxes.sum(dim=(1, 2)), [92127.95, 90467.61])
    assert_close(anchors.boxes[0, 0], [0.5594, 15.1627, 121.9545, 18.4707], 1e-3)
    assert_close(anchors.boxes[1, 0], [190.1069, 81.2537, 65.1440, 16.3308], 1e-3)
    assert (anchors.scores[:, :-1] >= anchors.scores[:, 1:]).all()  # more than the limit: sorted


@torch.no_grad()
def test_anchors_of_the_fixed_levels_alone(generated):
    generator, features, _ = generated
    generator.rule = generator.rule._replace(levels=0)
    anchors, _, probed = generator(features, SIZES)
    generator.rule = ProbingRule()
    assert not probed
    assert anchors.mask.sum(dim=1).tolist() == [195, 200]
    assert (anchors.boxes[0, 195:] == torch.tensor([160.0, 128, 320, 256])).all()  # padding
    assert not anchors.scores[0, 195:].any()


def filled_initializer():
    module = QueryInitializer(settings=SETTINGS, roi_positions=49, prior_probability=0.01)
    return fill(module, "rpn.", INITIALIZER)


@pytest.fixture(scope="module")
def initialized():
    boxes = box_cxcywh_to_xyxy(torch.stack([BOXES, 0.9 * BOXES]))
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 4] = False
    pyramid = [feature(level) for level in (2, 3, 4, 5)]
    with torch.no_grad():
        rois = ROIS(ROIS.prepare(pyramid), boxes)
        return pyramid, mask, filled_initializer()(rois, boxes, attention_mask(mask))


def test_initial_queries(initialized):
    queries = initialized[2]
    assert_close(queries.logits.sum(), 32.5935)
    assert_close(queries.logits[0, 0, :4], [3.37105, 0.47229, -0.71821, -0.58516])
    assert_close(queries.features.sum(), 10.3134)
    assert_close(queries.features.abs().mean(), 0.795201)
    xyzr = boxes_to_xyzr(queries.boxes, unit=4.0, ratio_scale=0.5)
    assert_close(xyzr[0, 0], [48.0199, 22.3440, 4.12913, -1.91882])
    assert_close(relative(queries.boxes)[0, 0], [0.600249, 0.349125, 0.827034, 0.072308])


def filled_decoders(kind, head):
    """One decoder of ASAG-A or ASAG-S with the parameters of one of the four."""
    options = {"channels": 256, "count": 1, "used": -1, "prior_probability": 0.01}
    if kind == "A":
        stage = AdaMixerStage(settings=SETTINGS, in_points=32, out_points=128, **STAGE_OPTIONS)
        decoders = AdaMixerDecoders(stage=stage, pooler=ROIS, **options)
        fill(decoders.stages[0], f"decoder.bbox_head.{head}.", ADAMIXER)
    else:
        sizes = {"dynamic_channels": 64, "roi_positions": 49}
        stage = RCNNHead(settings=SETTINGS, tower_activation="gelu", **sizes)
        decoders = RCNNDecoders(stage=stage, pooler=PoolingWithReplicatedBorder(), **options)
        fill(decoders.stages[0], f"decoder.head_series.{head}.")
    row = parameter("decoder.decoder_embedding.weight", (4, 256))[head]
    decoders.decoder_embedding.weight.data[0] = row
    return decoders.eval()


class PoolingWithReplicatedBorder(torch.nn.Module):
    """Pooling that the numbers of ASAG-S and of whole images were made with.

    Outside of the map it reads the border, where RoIAlign, as published, reads zeros.
    """

    strides = STRIDES

    def prepare(self, features):
        return features

    def forward(self, features, boxes):
        return torch.cat([self.pool(features, i, b) for i, bs in enumerate(boxes) for b in bs])

    def pool(self, features, image, box):
        x1, y1, x2, y2 = box.tolist()
        level = math.floor(4 + math.log2(math.sqrt((x2 - x1) * (y2 - y1)) / 224) + 1e-6)
        level = min(max(level, 2), 5) - 2
        cells, stride = features[level][image : image + 1], STRIDES[level]
        steps = (torch.arange(14) + 0.5) / 14
        height, width = cells.shape[2:]
        xs = (x1 / stride + steps * max((x2 - x1) / stride, 1.0) + 0.5) / width * 2 - 1
        ys = (y1 / stride + steps * max((y2 - y1) / stride, 1.0) + 0.5) / height * 2 - 1
        grid = torch.stack(torch.broadcast_tensors(xs[None, :], ys[:, None]), dim=-1)[None]
        sampled = F.grid_sample(cells, grid, padding_mode="border", align_corners=False)
        return F.avg_pool2d(sampled, 2).flatten(2).transpose(1, 2)


def test_both_poolings_are_equal_inside_of_the_map(initialized):
    pyramid = initialized[0]
    boxes = box_cxcywh_to_xyxy(torch.stack([0.9 * BOXES, 0.8 * BOXES]))
    pooled = PoolingWithReplicatedBorder()(pyramid, boxes)
    expected = ROIS(ROIS.prepare(pyramid), boxes)
    torch.testing.assert_close(pooled, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "head", "logits", "first", "boxes", "box"), [
    ("A", 0, -11.716, 1.8864, 22.0328, [1.08719, -0.19456, 0.50753, 0.02198]),
    ("A", 3, -37.449, 2.4624, 18.2748, [1.12808, -0.10686, 0.69853, 0.00836]),
    ("S", 0, 68.2118, 2.08631, 28.4977, [1.38378, 0.32589, 0.64563, 0.04438]),
    ("S", 3, 46.6553, 2.17456, 28.5152, [1.36504, 0.32178, 0.61198, 0.05029]),
])  # fmt: skip
def test_decoders(initialized, kind, head, logits, first, boxes, box):
    pyramid, mask, queries = initialized
    decoders = filled_decoders(kind, head)
    with torch.no_grad():
        out = decoders(pyramid, decoders.pooler.prepare(pyramid), queries, attention_mask(mask))
    assert_close(out.logits.sum(), logits, 5e-4 if kind == "A" else 1e-4)
    assert_close(out.logits[0, 0, 0, 0], first)
    assert_close(relative(out.boxes[0]).sum(), boxes)
    assert_close(relative(out.boxes[0])[0, 0], box, 1e-3)


@pytest.fixture(scope="module")
def scene(generated):
    """Targets, normalizers and the criterion."""
    boxes = [
        [[0.3, 0.4, 0.2, 0.1], [0.6, 0.5, 0.5, 0.6], [0.75, 0.2, 0.08, 0.12]],
        [[0.5, 0.5, 0.9, 0.8], [0.25, 0.7, 0.12, 0.2], [0.0, 0.0, 0.0, 0.0]],
    ]
    labels, mask = torch.tensor([[3, 17, 0], [79, 5, 0]]), torch.tensor([[True] * 3, [True] * 3])
    mask[1, 2] = False
    corners = box_cxcywh_to_xyxy(torch.tensor(boxes)) * SIZES.unsqueeze(1)
    targets = Targets(corners, labels, mask, SIZES)
    criterion = ASAGCriterion(weights=TermWeights(2.0, 5.0, 2.0))
    return targets, criterion.normalizers([criterion.count(targets)]), criterion


@pytest.mark.parametrize(("kind", "first", "last", "total"), [
    ("A", [2459.87, 0.2855, 0.8981], [2429.35, 0.3885, 1.0701], 25576.6),
    ("S", [2716.85, 0.3803, 0.7954], [2636.86, 0.3533, 0.8054], 27392.8),
])  # fmt: skip
def test_losses_of_whole_images(generated, initialized, scene, kind, first, last, total):
    pyramid, (anchors, fixed, probed) = initialized[0], generated[2]
    targets, normalizers, criterion = scene
    rois = PoolingWithReplicatedBorder()
    boxes, mask = box_cxcywh_to_xyxy(anchors.boxes), attention_mask(anchors.mask)
    with torch.no_grad():
        queries = filled_initializer()(rois(pyramid, boxes), boxes, mask)
        outputs = [queries[:2]]
        for head in range(4):
            decoders = filled_decoders(kind, head)
            decoders.pooler = rois
            out = decoders(pyramid, rois.prepare(pyramid), queries, mask)
            outputs.append((out.logits[0], out.boxes[0]))
        sets = Predictions(*map(torch.stack, zip(*outputs, strict=True)), torch.arange(5))
        losses = criterion.of_detections(sets, anchors.mask, targets, normalizers)
        of_anchors = criterion.of_anchors(fixed, probed, targets, normalizers)
    assert list(of_anchors) == ["loss_ce_anchor", "loss_bbox_anchor", "loss_giou_anchor"]
    assert_close(torch.stack([*of_anchors.values()]), [8 * 123.575, 4 * 3.29224, 2 * 4.28444])
    for suffix, expected in (("_rpn", [2491.84, 0.4573, 1.1964]), ("_0", first), ("", last)):
        names = {"ce": 2.0, "bbox": 5.0, "giou": 2.0}  # and their weights
        values = [losses[f"loss_{name}{suffix}"].item() / w for name, w in names.items()]
        assert values == pytest.approx(expected, rel=1e-4, abs=5e-4)
    assert sum((losses | of_anchors).values()).item() == pytest.approx(total, rel=2e-5)
