"""Recollection in the cascade: what a loop over groups gives, and nothing at inference."""

import pytest
import torch
from conftest import batch
from recollection_scenes import (
    DLA,
    PLAIN,
    SIZES,
    STAGES,
    gradients,
    inputs_of,
    losses_of,
    model_of,
    sqr,
)

from benchmarks.reference_recollection import refine_by_loop
from dsrcnn.modeling.decoder.sqr import plain_sets
from dsrcnn.modeling.meta_arch.base import image_sizes, pad_targets
from dsrcnn.structures import Predictions


@pytest.mark.parametrize("matching", [(), DLA], ids=["Hungarian", "DLA"])
@pytest.mark.parametrize(
    ("images", "opts"),
    [
        *((images, ()) for images in (1, 2, 3, 4)),
        *((images, ("START", 2)) for images in (1, 2, 3, 4)),
        (2, ("MODE", "dense")),
        (2, ("DETACH_INIT_BOXES", False)),
        (2, ("WINDOWS", "[[0, 1], [0, 2], [0, 4], [3, 8]]")),
    ],
)
def test_all_groups_at_once_are_the_loop_over_groups(images, opts, matching):
    model = model_of(*sqr(*opts), *matching).train()
    features, proposals = inputs_of(model, images)
    leaves = [*features, *proposals]
    found = sum(losses_of(model, model.head(features, proposals), images).values())
    sets = refine_by_loop(model.head, features, proposals, model.head.windows)
    expected = sum(sum(losses_of(model, one, images).values()) for one in sets)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    pairs = zip(gradients(model, found, leaves), gradients(model, expected, leaves), strict=True)
    for a, b in pairs:
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * max(1, b.abs().max().item()))


@pytest.mark.parametrize(
    "opts", [("CHUNK", 1), ("CHUNK", 2), ("CHECKPOINT", True), ("CHUNK", 2, "CHECKPOINT", True)]
)
def test_chunks_and_checkpointing_change_no_gradient(opts):
    results = []
    for chosen in ((), opts):
        model = model_of(*sqr(*chosen)).train()
        features, proposals = inputs_of(model, 2)
        leaves = [*features, *proposals]
        loss = sum(losses_of(model, model.head(features, proposals), 2).values())
        results.append((loss, *gradients(model, loss, leaves)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("opts", [(), ("MODE", "dense"), ("CHUNK", 1)])
def test_the_last_group_of_every_stage_is_the_plain_cascade(opts):
    plain, model = model_of(*PLAIN).train(), model_of(*sqr(*opts)).train()
    features, proposals = inputs_of(plain, 2)
    expected, found = plain.head(features, proposals), model.head(features, proposals)
    sets = plain_sets(found)
    assert found.stage[sets].tolist() == expected.stage.tolist() == [0, 1, 2, 3]
    # One call for several groups multiplies larger matrices, which rounds differently.
    for a, b in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(a[sets], b, rtol=0, atol=0 if opts == ("CHUNK", 1) else 1e-12)


def test_the_last_group_of_a_loop_is_what_inference_computes_to_the_last_bit():
    model = model_of(*sqr()).train()
    features, proposals = inputs_of(model, 2)
    last = list(refine_by_loop(model.head, features, proposals, model.head.windows))[-1]
    inference = model.eval().head(features, proposals)
    assert last.stage.tolist() == inference.stage.tolist() == [STAGES - 1]
    assert torch.equal(last.logits, inference.logits)
    assert torch.equal(last.boxes, inference.boxes)


def test_groups_and_images_do_not_see_each_other():
    model = model_of(*sqr()).eval()
    stage = model.head.head_series[0]
    torch.manual_seed(2)
    boxes = torch.tensor([2.0, 3.0, 30.0, 40.0], dtype=torch.float64).expand(2, 3, 7, 4)
    states = torch.randn(2, 3, 7, 32, dtype=torch.float64)
    pooled = torch.randn(2 * 3 * 7, 49, 32, dtype=torch.float64)
    before = stage(pooled, boxes, states)
    changed = states.clone()
    changed[1, 2] += 1.0
    after = stage(pooled, boxes, changed)
    for a, b in zip(before, after, strict=True):
        same = (a == b).flatten(2).all(dim=2)
        assert same.tolist() == [[True] * 3, [True, True, False]]


def test_features_of_an_image_reach_its_own_groups_only():
    model = model_of(*sqr()).train()
    features, proposals = inputs_of(model, 2)
    before = model.head(features, proposals)
    for level in features:
        level.data[1] += 1.0
    after = model.head(features, proposals)
    same = (before.logits == after.logits).flatten(2).all(dim=2)
    assert same[:, 0].all()
    assert not same[:, 1].any()


def test_the_losses_of_a_stage_train_the_features_of_earlier_ones_but_not_their_boxes():
    model = model_of(*sqr()).train()
    features, proposals = inputs_of(model, 2)
    losses = losses_of(model, model.head(features, proposals), 2)
    for late in range(1, STAGES):
        suffix = "" if late == STAGES - 1 else f"_{late}"
        loss = sum(losses[f"loss_{name}{suffix}"] for name in ("ce", "bbox", "giou"))
        for earlier in model.head.head_series[:late]:
            boxes = [*earlier.bboxes_delta.parameters(), *earlier.reg_module.parameters()]
            content = [earlier.linear1.weight, earlier.inst_interact.dynamic_layer.weight]
            of_boxes, of_content = (
                torch.autograd.grad(loss, wanted, allow_unused=True, retain_graph=True)
                for wanted in (boxes, content)
            )
            assert all(g is None or not g.any() for g in of_boxes)
            assert all(g.abs().max() > 0 for g in of_content)


@pytest.mark.parametrize("detach", [True, False])
def test_initial_boxes_learn_from_the_second_stage_only_if_asked(detach):
    model = model_of(*sqr("DETACH_INIT_BOXES", detach)).train()
    features, proposals = inputs_of(model, 1)
    predictions = model.head(features, proposals)
    for stage, reached in ((0, True), (1, not detach), (2, False)):
        of_stage = predictions.boxes[predictions.stage == stage].sum()
        (found,) = torch.autograd.grad(
            of_stage, [proposals.boxes], allow_unused=True, retain_graph=True
        )
        assert (found is not None and found.abs().max().item() > 0) == reached


def test_every_group_learns_every_object_once():
    model = model_of(*sqr(), "MODEL.SparseRCNN.NUM_HEADS", 6).train()
    features, proposals = inputs_of(model, 2)
    predictions = model.head(features, proposals)
    groups = [1, 2, 3, 5, 8, 13]
    assert predictions.stage.tolist() == [t for t, count in enumerate(groups) for _ in range(count)]
    records = batch([(96, 96)] * 2, [3, 2])
    targets = pad_targets(records, image_sizes([(96, 96)] * 2, model.device).double())
    positives = (model.matcher(predictions, targets) >= 0).sum(dim=2)
    assert positives.tolist() == [[3, 2]] * 32


def test_units_follow_the_stage_of_a_group_whatever_its_route():
    opts = (*DLA, "MODEL.SparseRCNN.DLA.STATIC_UNITS", 3, "MODEL.SparseRCNN.NUM_HEADS", 6)
    options = ("MODEL.SparseRCNN.NUM_PROPOSALS", 40, "MODEL.SparseRCNN.DLA.DECISION", "exact")
    model = model_of(*sqr(), *opts, *options, "MODEL.SparseRCNN.DLA.MIN_UNITS", 0).train()
    predictions = model.predict(batch(SIZES[:1], [1]))[0]
    step = [3 - 0.5 * (5 - s) for s in predictions.stage.tolist()]
    assert sum(step) == 76  # 1 x 0.5 + 2 x 1 + 3 x 1.5 + 5 x 2 + 8 x 2.5 + 13 x 3
    assert sum(step[i] for i in plain_sets(predictions)) == 10.5  # without recollection
    targets_of = batch(SIZES[:1], [1])
    targets = pad_targets(targets_of, image_sizes(SIZES[:1], model.device).double())
    positives = (model.matcher(predictions, targets) >= 0).sum(dim=(1, 2)).tolist()
    assert positives == [int(k) for k in step]


@pytest.mark.parametrize("matching", [(), DLA], ids=["Hungarian", "DLA"])
@pytest.mark.parametrize(("reduction", "factor"), [("sum", 2.0), ("mean", 1.0)])
def test_a_group_that_comes_twice_doubles_the_sum_and_not_the_mean(reduction, factor, matching):
    model = model_of(*sqr("REDUCTION", reduction), *matching).train()
    features, proposals = inputs_of(model, 2)
    plain = model_of(*PLAIN).train().head(features, proposals)
    once = losses_of(model, plain, 2)
    twice = Predictions(*(torch.cat([x, x[-1:]]) for x in plain[:3]))
    found = losses_of(model, twice, 2)
    for name, value in found.items():
        wanted = once[name] * (factor if name in ("loss_ce", "loss_bbox", "loss_giou") else 1.0)
        torch.testing.assert_close(value, wanted)


def test_off_is_off_to_the_last_bit():
    inputs = batch(SIZES[:2], [3, 2])
    results = []
    others = ("START", 2, "MODE", "dense", "CHUNK", 1, "REDUCTION", "mean", "CHECKPOINT", True)
    off = sqr(*others, "DETACH_INIT_BOXES", False, "ENABLED", False)
    for opts in (PLAIN, sqr("START", STAGES), off):
        model = model_of(*opts).float().train()
        losses = model(inputs)
        sum(losses.values()).backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        results.append([*losses.values(), *grads])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    "opts",
    [
        (),
        ("START", 3),
        ("MODE", "dense"),
        ("WINDOWS", "[[0, 1], [0, 2], [0, 4], [3, 8]]"),
        ("CHUNK", 1, "CHECKPOINT", True, "REDUCTION", "mean", "DETACH_INIT_BOXES", False),
    ],
)
def test_inference_and_keys_are_those_of_the_plain_cascade(opts):
    plain, model = model_of(*PLAIN).eval(), model_of(*sqr(*opts)).eval()
    assert list(plain.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        expected, found = plain(batch(SIZES[:2], [3, 2])), model(batch(SIZES[:2], [3, 2]))
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a["instances"].scores, b["instances"].scores)
        assert torch.equal(a["instances"].pred_classes, b["instances"].pred_classes)
        assert torch.equal(a["instances"].pred_boxes.tensor, b["instances"].pred_boxes.tensor)
