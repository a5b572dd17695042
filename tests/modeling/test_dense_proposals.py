"""Distinct proposals from the image: selection, assignments, losses, and the detector."""

import math

import pytest
import torch
from conftest import batch, quick_cfg, tiny_cfg, train
from detectors import DLA, SIZES, SQR, enable, model_of, options, pyramid, train_step
from torchvision.ops import box_iou, nms

from dsrcnn.config import check_config, read_cfg
from dsrcnn.engine.fit_weights import load_fitting
from dsrcnn.errors import ConfigError
from dsrcnn.modeling.proposals import build_proposals
from dsrcnn.modeling.proposals.dense import locations_of, select_distinct
from dsrcnn.structures import Predictions, Targets

DENSE = options("PROPOSALS.NAME", "DenseDistinct")
CPU = torch.device("cpu")


def source_of(*opts):
    """The source alone, in float64, with outputs unlike those of an untrained model."""
    torch.manual_seed(0)
    source = build_proposals(tiny_cfg(*DENSE, *opts)).double()
    for layer in (source.class_logits, source.auxiliary_logits, source.distances):
        torch.nn.init.normal_(layer.weight, std=0.2)
    return source


def features_of(images=2, **size):
    return [x.double() for x in pyramid(images, channels=32, **size)]


def sizes_of(*sizes):
    return torch.tensor([[w, h, w, h] for h, w in sizes], dtype=torch.float64)


def predictions_of(logits, boxes, mask=None):
    """One set for one image, from lists."""
    tensors = [torch.tensor(x, dtype=torch.float64)[None, None] for x in (logits, boxes)]
    mask = None if mask is None else torch.tensor([mask])
    return Predictions(*tensors, torch.zeros(1, dtype=torch.int64), mask)


def targets_of(boxes, labels, size=(100, 100)):
    values = torch.tensor([boxes], dtype=torch.float64), torch.tensor([labels])
    return Targets(*values, torch.ones(1, len(labels), dtype=torch.bool), sizes_of(size))


def test_locations_are_centers_of_cells():
    expected = [[4, 4, 8], [12, 4, 8], [8, 8, 16], [8, 24, 16]]
    with torch.inference_mode():
        locations = locations_of(((1, 2), (2, 1)), (8, 16), CPU)
    assert locations.tolist() == expected
    assert not locations.is_inference()  # training at this size reads them, too


@pytest.mark.parametrize(("levels", "strides"), [
    (["p2", "p3", "p4", "p5"], (8, 16, 32)), (["p4", "p5"], (16, 32)), (["p2"], (4,)),
])  # fmt: skip
def test_the_level_of_stride_4_is_read_only_if_there_is_no_other(levels, strides):
    source = build_proposals(tiny_cfg(*DENSE, "MODEL.ROI_HEADS.IN_FEATURES", levels))
    assert source.strides == strides


def test_an_untrained_box_is_eight_strides_wide_and_outputs_are_distances_of_the_sides():
    source = source_of()
    torch.nn.init.zeros_(source.distances.weight)
    locations = locations_of(((1, 1), (1, 1)), (8, 16), CPU)
    tokens = torch.zeros(1, 2, 32, dtype=torch.float64)
    expected = [[4 - 32, 4 - 32, 4 + 32, 4 + 32], [8 - 64, 8 - 64, 8 + 64, 8 + 64]]
    assert source._boxes(tokens, locations)[0].tolist() == expected
    with torch.no_grad():
        source.distances.bias.copy_(torch.tensor([0.5, 0.25, 2.0, 1.0]).log())
    expected = torch.tensor([4 - 16, 4 - 8, 4 + 64, 4 + 32.0]).double()
    torch.testing.assert_close(source._boxes(tokens, locations)[0, 0], expected)


# IoU of the first with the second 0.8, with the third 0.69; of the second with the third 0.8625.
CHAIN = [[0, 0, 10, 10], [0, 0, 10, 8], [0, 0, 10, 6.9], [20, 20, 30, 30], [0, 0, 50, 50]]


@pytest.mark.parametrize(("count", "index", "distinct"), [
    (2, [0, 2], [1, 1]),
    (3, [0, 2, 3], [1, 1, 1]),
    (4, [0, 2, 3, 1], [1, 1, 1, 0]),  # the best of the suppressed
    (7, [0, 2, 3, 1, 0, 2, 3], [1, 1, 1, 0, 0, 0, 0]),  # the image has no more locations
])  # fmt: skip
def test_distinct_locations_come_first_then_suppressed_ones_and_none_outside(
    count, index, distinct
):
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.95]])
    is_outside = torch.tensor([[False, False, False, False, True]])
    selected, is_distinct = select_distinct(scores, torch.tensor([CHAIN]), is_outside, count)
    assert selected.tolist() == [index]
    assert is_distinct.int().tolist() == [distinct]


@pytest.mark.parametrize("seed", range(3))
def test_the_selection_is_that_of_greedy_suppression_among_the_best_thousand(seed):
    torch.manual_seed(seed)
    corner = torch.rand(2, 1500, 2) * 60
    boxes = torch.cat([corner, corner + 20 + 30 * torch.rand(2, 1500, 2)], dim=-1)
    scores, is_outside = torch.rand(2, 1500), torch.rand(2, 1500) < 0.2
    index, distinct = select_distinct(scores, boxes, is_outside, 100)
    for i in range(2):
        inside = (~is_outside[i]).nonzero().squeeze(1)
        best = inside[scores[i, inside].argsort(descending=True)[:1000]]
        kept = best[nms(boxes[i, best], scores[i, best], 0.7)]
        assert len(kept) > 100
        assert index[i].tolist() == kept[:100].tolist()
        assert distinct[i].all()


def test_proposals_are_boxes_and_projected_features_of_the_selected_locations():
    source, sizes = source_of(), sizes_of((64, 96), (60, 90))
    proposals, candidates = source.propose(features_of(), sizes)
    everywhere = candidates.candidates
    assert proposals.boxes.shape == (2, 8, 4)
    assert proposals.features.shape == (2, 8, 32)
    assert not proposals.boxes.requires_grad
    assert torch.equal(proposals.boxes, candidates.boxes[0])
    assert candidates.mask.all()
    # Distinct: no pair overlaps by more than the threshold.
    for boxes in proposals.boxes:
        assert (box_iou(boxes, boxes) - torch.eye(8)).max() <= 0.7
    # All of them are boxes of some location, and each contains its location.
    locations = locations_of(((8, 12), (4, 6), (2, 3)), (8, 16, 32), CPU)
    is_same = (everywhere.boxes[0].unsqueeze(1) == proposals.boxes.unsqueeze(2)).all(dim=-1)
    assert (is_same.sum(dim=-1) == 1).all()
    centers = locations[is_same.long().argmax(dim=-1)][..., :2]
    assert (proposals.boxes[..., :2] < centers).all()
    assert (centers < sizes[:, None, :2]).all()


def test_the_cascade_trains_both_towers_by_the_features():
    source = source_of()
    features = [x.requires_grad_() for x in features_of()]
    proposals, _ = source(features, sizes_of((64, 96), (64, 96)))
    proposals.features.sum().backward()
    for tower in (source.class_tower, source.box_tower):
        assert all(p.grad.abs().sum() > 0 for p in tower.parameters())
    assert features[0].grad is None  # stride 4
    assert all(x.grad.abs().sum() > 0 for x in features[1:])


def test_padding_of_the_batch_changes_nothing_and_is_not_selected():
    """An image alone, and beside a larger one, with anything in the padding."""
    source, size = source_of(*options("NUM_PROPOSALS", 40)), sizes_of((64, 48))
    padded = features_of(1, height=128, width=160)
    small = [x[:, :, : 64 // s, : -(-48 // s)] for x, s in zip(padded, (4, 8, 16, 32), strict=True)]
    alone, of_alone = source.propose(small, size)
    beside, of_beside = source.propose(padded, size)
    torch.testing.assert_close(beside, alone)
    assert torch.equal(of_beside.mask, of_alone.mask)
    everywhere = of_beside.candidates
    inside = (locations_of(((16, 20), (8, 10), (4, 5)), (8, 16, 32), CPU)[:, :2] < size[:, :2]).all(
        1
    )
    assert torch.equal(everywhere.mask[0], inside)
    assert (everywhere.logits[0, 0, ~inside] == -20).all()


def test_an_image_of_fewer_locations_than_proposals_repeats_its_own():
    source, sizes = source_of(*options("NUM_PROPOSALS", 30)), sizes_of((32, 32), (96, 96))
    proposals, candidates = source.propose(features_of(height=96, width=96), sizes)
    first = candidates.candidates.boxes[0, 0][candidates.candidates.mask[0]]
    assert len(first) == 16 + 4 + 1
    is_own = (proposals.boxes[0].unsqueeze(1) == first).all(dim=-1)
    assert (is_own.sum(dim=0) >= 1).all()  # every location is there
    assert is_own.any(dim=-1).all()  # and nothing else
    assert not candidates.mask[0, 21:].any()
    assert candidates.mask[1].sum() > 21


def test_a_masked_prediction_is_never_assigned_even_for_want_of_others():
    source = source_of()
    boxes = [[0, 0, 50, 50], [0, 0, 49, 50], [60, 60, 90, 90]]
    targets = targets_of([[0, 0, 49, 50], [60, 60, 90, 90], [10, 10, 20, 20]], [0, 1, 2])
    predictions = predictions_of([[0.0] * 5] * 3, boxes, [True, False, True])
    assert source.matcher(predictions, targets).tolist() == [[[0, -1, 1]]]
    without = predictions._replace(mask=None)
    assert source.matcher(without, targets).tolist() == [[[2, 0, 1]]]
    assert source.auxiliary_matcher(predictions, targets)[0, 0, 1] == -1


def test_every_object_has_its_eight_cheapest_locations_and_one_proposal():
    model = model_of(*DENSE).double()
    inputs = batch([(64, 96), (60, 90)], [3, 2])
    predictions, images = model.raw_predictions(inputs)
    targets = Targets.from_inputs(inputs, images.sizes)
    source, candidates = model.proposals, predictions.candidates
    matched = source.matcher(candidates, targets)[0]
    everywhere = candidates.candidates
    auxiliary = source.auxiliary_matcher(everywhere, targets)[0]
    cost, _ = source.auxiliary_matcher.finite_costs(everywhere, targets)
    for image, count in enumerate([3, 2]):
        assert matched[image].sort(descending=True).values[:count].tolist() == [*range(count)][::-1]
        assert (matched[image] >= 0).sum() == count
        lowest = {}
        for row in range(count):
            for location in cost[0, image, row].argsort()[:8].tolist():
                lowest.setdefault(location, []).append((cost[0, image, row, location].item(), row))
        expected = torch.full_like(auxiliary[image], -1)
        for location, claims in lowest.items():
            expected[location] = min(claims)[1]
        assert torch.equal(auxiliary[image], expected)
        assert (expected >= 0).sum() > 8


def focal(p, q, alpha=0.25):
    """Loss of the score `p` that learns `q` > 0, or as background of `q` 0."""
    entropy = -q * math.log(p) - (1 - q) * math.log(1 - p)
    return (alpha if q else 1 - alpha) * abs(q - p) ** 2 * entropy


def test_losses_by_hand():
    """One object; a selected location fits it, one overlaps by a half, one is not distinct."""
    source = source_of(*options("NUM_CLASSES", 1))
    targets = targets_of([[20, 20, 40, 40]], [0])
    boxes = [[20, 20, 40, 40], [20, 20, 40, 30], [20, 20, 40, 39]]
    low, high = math.log(0.2 / 0.8), math.log(0.4 / 0.6)  # scores 0.2 and 0.4
    main = predictions_of([[low], [high], [-20.0]], boxes, [True, True, False])
    everywhere = predictions_of([[high], [low], [-20.0]], boxes, [True, True, False])
    losses = source.losses(main._replace(candidates=everywhere), targets, None)
    terms = ("loss_ce", "loss_bbox", "loss_giou")
    assert list(losses) == [f"{term}_dense{kind}" for kind in ("", "_aux") for term in terms]
    value = {name: pytest.approx(x.item(), rel=1e-6, abs=1e-9) for name, x in losses.items()}
    # One to one: the first is the object, though the second has the higher score.
    assert value["loss_ce_dense"] == 2 * (focal(0.2, 1) + focal(0.4, 0))
    assert value["loss_bbox_dense"] == 0
    assert value["loss_giou_dense"] == 0
    # One to many: both learn their IoU; divided by eight times the objects.
    assert value["loss_ce_dense_aux"] == 2 * (focal(0.4, 1) + focal(0.2, 0.5)) / 8
    assert value["loss_bbox_dense_aux"] == 5 * (10 / 100) / 8
    assert value["loss_giou_dense_aux"] == 2 * (1 - 0.5) / 8


def test_masked_predictions_get_no_gradient_from_the_class_loss():
    source = source_of(*options("NUM_PROPOSALS", 30))
    sizes = sizes_of((32, 32), (96, 96))
    _, candidates = source.propose(features_of(height=96, width=96), sizes)
    targets = Targets.from_inputs(batch([(32, 32), (96, 96)], [1, 3]), sizes)
    losses = source.losses(candidates, targets, None)
    for name, part in (("loss_ce_dense", candidates), ("loss_ce_dense_aux", candidates.candidates)):
        gradient = torch.autograd.grad(losses[name], part.logits, retain_graph=True)[0][0]
        # The gradient of a masked logit ends at the mask, and its loss is nothing.
        assert gradient[~part.mask].abs().max() < 1e-12
        assert (gradient[part.mask].abs().sum(dim=-1) > 0).all()


def test_normalizers_count_the_objects_of_all_parts():
    source = source_of()
    parts = [Targets.from_inputs(batch(SIZES, n), sizes_of(*SIZES)) for n in ([3, 1], [0, 2])]
    assert source.loss_normalizers(parts).num_boxes == 6


VARIANTS = {
    "plain": [],
    "DLA": DLA,
    "SQR": SQR,
    "DLA and SQR": [*DLA, *SQR],
    "softmax": options("USE_FOCAL", False),
    "AdaMixer": ["MODEL.META_ARCHITECTURE", "AdaMixer"],
    "last stage": options("DEEP_SUPERVISION", False),
}


@pytest.mark.parametrize("name", [n for n in VARIANTS if n != "last stage"])
@pytest.mark.parametrize("counts", [[3, 1], [0, 0], [12, 0]])  # more objects than proposals
def test_every_parameter_learns(name, counts):
    losses = train_step(model_of(*DENSE, *VARIANTS[name]), batch([(64, 96), (60, 90)], counts))
    assert len(losses) == 6 + 6


@pytest.mark.parametrize("opts", VARIANTS.values(), ids=VARIANTS)
def test_evaluation_has_as_many_proposals_for_any_image(opts):
    model = model_of(*DENSE, *opts).eval()
    predictions = model.raw_predictions(batch([(64, 96), (32, 32)], [0, 0]))[0]
    assert predictions.boxes.shape == (1, 2, 8, 4)
    assert predictions.candidates is None
    assert len(model(batch(SIZES, [0, 0]))) == 2


def test_half_precision_leaves_boxes_in_float32():
    model = model_of(*DENSE)
    with torch.autocast("cpu", torch.bfloat16):
        predictions, _ = model.raw_predictions(batch(SIZES, [0, 0]))
        losses = model(batch(SIZES, [3, 1]))
    for part in (predictions, predictions.candidates, predictions.candidates.candidates):
        assert part.boxes.dtype == torch.float32
    sum(losses.values()).backward()
    assert all(torch.isfinite(x) for x in losses.values())


def test_an_official_checkpoint_fills_the_stages_and_the_rest_is_reported():
    model = model_of(*DENSE)
    state = model_of(*options("NUM_HEADS", 3), seed=1).state_dict()
    fit = load_fitting(model, state, "model.pth", resize=True)
    loaded = {k: v for k, v in model.state_dict().items() if k not in fit.missing}
    assert all(torch.equal(v, state[k]) for k, v in loaded.items())
    assert {k.split(".")[0] for k in loaded} == {"backbone", "head"}
    assert all(k.startswith("proposal_generator.") for k in fit.missing)
    unused = {k for k in fit.unused if not k.startswith("head.head_series.2.")}
    assert unused == {"init_proposal_boxes.weight", "init_proposal_features.weight"}
    text = fit.report()
    assert "Not in the file: proposal_generator.auxiliary_logits (2)" in text
    assert "not in the model: head.head_series" in text


@pytest.mark.slow
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path):
    opts = [*DENSE, "SOLVER.MAX_ITER", "4", "SOLVER.CHECKPOINT_PERIOD", "2"]
    whole = train(quick_cfg(tmp_path / "whole", *opts)).model.state_dict()
    (tmp_path / "rest").mkdir()
    checkpoint = "model_0000001.pth"
    (tmp_path / "rest" / checkpoint).write_bytes((tmp_path / "whole" / checkpoint).read_bytes())
    (tmp_path / "rest" / "last_checkpoint").write_text(checkpoint)
    rest = train(quick_cfg(tmp_path / "rest", *opts), resume=True).model.state_dict()
    assert all(torch.equal(v, rest[k]) for k, v in whole.items())


def test_combinations_that_contradict_each_other_are_refused():
    with pytest.raises(ConfigError, match=r"'DenseDistinct', but MODEL\.SparseRCNN\.DPG\.ENABLED"):
        model_of(*DENSE, *enable("DPG"))
    for config, words in (
        ("coco/deformable_detr_R50_50ep", "'DenseDistinct', but DeformableDETR needs queries"),
        ("coco/asag_s_R50_100pro_3x", "'DenseDistinct', but ASAG .* Write .*NAME ''"),
    ):
        with pytest.raises(ConfigError, match=words):
            check_config(read_cfg(config, [*DENSE, "MODEL.DEVICE", "cpu"]))
