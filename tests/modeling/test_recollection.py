"""Recollection in the cascade: what a loop over groups gives, and nothing at inference."""

import pytest
import torch
from conftest import batch, tiny_cfg
from detectron2.modeling import build_model

from dsrcnn.benchmark.reference_recollection import refine_by_loop
from dsrcnn.errors import ConfigError
from dsrcnn.modeling.decoder.recollection import plain_sets, recollection_windows
from dsrcnn.modeling.inputs import image_sizes, pad_targets
from dsrcnn.structures import Predictions, Proposals

SIZES = [(64, 96), (96, 64), (64, 64), (96, 96)]
STAGES = 4
PLAIN = ("MODEL.SparseRCNN.NUM_HEADS", STAGES, "MODEL.SparseRCNN.NUM_PROPOSALS", 7)
DLA = ("MODEL.SparseRCNN.DLA.ENABLED", True)


def sqr(*opts, start=1):
    prefix = "MODEL.SparseRCNN.SQR."
    own = [f"{prefix}{x}" if isinstance(x, str) and x.isupper() else x for x in opts]
    return (*PLAIN, f"{prefix}ENABLED", True, f"{prefix}START", start, *own)


def model_of(*opts):
    torch.manual_seed(0)
    return build_model(tiny_cfg(*opts)).double()


def inputs_of(model, images):
    """Features, proposals and targets that need no backbone: leaves to differentiate by."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.rand(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    features = [draw(images, 32, 24 // 2**i, 24 // 2**i).requires_grad_() for i in range(4)]
    corner = draw(images, 7, 2) * 50
    boxes = torch.cat([corner, corner + 8 + draw(images, 7, 2) * 40], dim=-1).requires_grad_()
    states = (draw(images, 7, 32) - 0.5).requires_grad_()
    return features, Proposals(boxes, states)


def losses_of(model, predictions, images):
    records = batch([(96, 96)] * images, [(i + 2) % 4 for i in range(images)])
    sizes = image_sizes([(96, 96)] * images, model.device).double()
    targets = pad_targets(records, sizes)
    return model.criterion(predictions, targets, model.matcher(predictions, targets))


def gradients(model, loss, leaves):
    model.zero_grad()
    wanted = [*leaves, *(p for p in model.head.parameters())]
    return torch.autograd.grad(loss, wanted, allow_unused=True)


@pytest.mark.parametrize("matching", [(), DLA], ids=["Hungarian", "DLA"])
@pytest.mark.parametrize("images", [1, 2, 3, 4])
@pytest.mark.parametrize("start", [1, 2])
def test_all_groups_at_once_are_the_loop_over_groups(images, start, matching):
    model = model_of(*sqr(start=start), *matching).train()
    features, proposals = inputs_of(model, images)
    leaves = [*features, *proposals]
    found = sum(losses_of(model, model.head(features, proposals), images).values())
    windows = recollection_windows(STAGES, start=start)
    sets = refine_by_loop(model.head, features, proposals, windows)
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


def test_a_stage_trains_the_features_of_earlier_ones_but_not_their_boxes():
    model = model_of(*sqr()).train()
    features, proposals = inputs_of(model, 1)
    predictions = model.head(features, proposals)
    late = predictions.boxes[predictions.stage == 2].sum()
    earlier = model.head.head_series[1]
    box, content = torch.autograd.grad(
        late, [earlier.bboxes_delta.weight, earlier.linear1.weight], allow_unused=True
    )
    assert box is None or not box.any()
    assert content.abs().max() > 0


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
    model = model_of(*sqr()).train()
    features, proposals = inputs_of(model, 2)
    predictions = model.head(features, proposals)
    assert predictions.stage.tolist() == [0, 1, 1, 2, 2, 2, 3, 3, 3, 3, 3]
    records = batch([(96, 96)] * 2, [3, 2])
    targets = pad_targets(records, image_sizes([(96, 96)] * 2, model.device).double())
    positives = (model.matcher(predictions, targets) >= 0).sum(dim=2)
    assert positives.tolist() == [[3, 2]] * 11


def test_units_follow_the_stage_of_a_group_whatever_its_route():
    opts = (*DLA, "MODEL.SparseRCNN.DLA.STATIC_UNITS", 3, "MODEL.SparseRCNN.NUM_HEADS", 6)
    options = ("MODEL.SparseRCNN.NUM_PROPOSALS", 40, "MODEL.SparseRCNN.DLA.DECISION", "exact")
    model = model_of(*sqr(), *opts, *options, "MODEL.SparseRCNN.DLA.MIN_UNITS", 0).train()
    predictions = model.predict(batch(SIZES[:1], [1]))[0]
    step = [3 - 0.5 * (5 - s) for s in predictions.stage.tolist()]
    assert sum(step) == 76  # 1 x 0.5 + 2 x 1 + 3 x 1.5 + 5 x 2 + 8 x 2.5 + 13 x 3
    targets_of = batch(SIZES[:1], [1])
    targets = pad_targets(targets_of, image_sizes(SIZES[:1], model.device).double())
    positives = (model.matcher(predictions, targets) >= 0).sum(dim=(1, 2)).tolist()
    assert positives == [int(k) for k in step]


@pytest.mark.parametrize(("reduction", "factor"), [("sum", 2.0), ("mean", 1.0)])
def test_a_group_that_comes_twice_doubles_the_sum_and_not_the_mean(reduction, factor):
    model = model_of(*sqr("REDUCTION", reduction)).train()
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
    for opts in (PLAIN, sqr(start=STAGES), (*PLAIN, "MODEL.SparseRCNN.SQR.START", 1)):
        model = model_of(*opts).float().train()
        losses = model(inputs)
        sum(losses.values()).backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        results.append([*losses.values(), *grads])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    "opts", [(), ("MODE", "dense"), ("CHUNK", 1), ("CHECKPOINT", True), ("REDUCTION", "mean")]
)
def test_inference_and_keys_are_those_of_the_plain_cascade(opts):
    plain, model = model_of(*PLAIN).eval(), model_of(*sqr(*opts)).eval()
    assert list(plain.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        expected, found = plain(batch(SIZES[:2], [3, 2])), model(batch(SIZES[:2], [3, 2]))
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a["instances"].scores, b["instances"].scores)
        assert torch.equal(a["instances"].pred_boxes.tensor, b["instances"].pred_boxes.tensor)


def test_recollection_is_switched_by_the_mode_not_by_gradients():
    model = model_of(*sqr()).train()
    features, proposals = inputs_of(model, 1)
    with torch.no_grad():
        assert len(model.head(features, proposals).stage) == 11


def test_losses_of_an_untrained_head_grow_with_the_groups():
    inputs = batch(SIZES[:2], [3, 2])
    six = ("MODEL.SparseRCNN.NUM_HEADS", 6)
    plain = sum(model_of(*PLAIN, *six).train()(inputs).values()).item()
    found = sum(model_of(*sqr(), *six).train()(inputs).values()).item()
    assert 4.5 < found / plain < 6.2  # 32 groups to 6


@pytest.mark.parametrize(
    "opts",
    [
        DLA,
        (*DLA, "MODEL.SparseRCNN.DLA.MATCHER", "SimOTAMatcher"),
        ("MODEL.SparseRCNN.DPG.ENABLED", True),
        ("MODEL.SparseRCNN.USE_FOCAL", False),
        ("MODEL.SparseRCNN.SQR.REDUCTION", "mean"),
        ("MODEL.CHECKPOINT.STAGES", True),
    ],
)
def test_recollection_trains_with(opts):
    torch.manual_seed(0)
    model = build_model(tiny_cfg(*sqr(), *opts))
    for counts in ([3, 2], [0, 1]):
        losses = model(batch(SIZES[:2], counts))
        assert len(losses) == 3 * STAGES
        sum(losses.values()).backward()
        assert all(torch.isfinite(v) for v in losses.values())
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_windows_from_a_config_replace_mode_and_start():
    written = "[[0, 1], [0, 2], [0, 4], [6, 8]]"
    model = build_model(tiny_cfg(*sqr("WINDOWS", written)))
    assert model.head.windows == ((0, 1), (0, 2), (0, 4), (6, 8))
    with pytest.raises(ConfigError, match=r"for stage 4; write \[start, 8\]"):
        build_model(tiny_cfg(*sqr("WINDOWS", written.replace("6, 8", "6, 9"))))


def test_recollection_trains_in_bfloat16_with_averaged_weights():
    from dsrcnn.engine.average import AveragedWeights

    torch.manual_seed(0)
    model = build_model(tiny_cfg(*sqr(), *DLA)).train()
    average = AveragedWeights(model)
    average.start()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(batch(SIZES[:2], [3, 2]))
    sum(losses.values()).backward()
    average.update()
    assert all(torch.isfinite(v) for v in losses.values())
    assert list(average.weights()) == list(model.state_dict())
