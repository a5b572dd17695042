"""Recollection in the cascade: equal to a loop over groups, absent at inference, and its log."""

import pytest
import torch
from conftest import batch, tiny_cfg
from detectors import DLA, SIZES, enable, options, train_step
from detectors import model_of as float32_model
from detectron2.utils.events import EventStorage

from benchmarks.recollection import refine_by_loop
from dsrcnn.modeling.meta_arch.base import size_tensor
from dsrcnn.structures import Proposals, Targets
from dsrcnn.utils.training import use_training_context
from tests.matching.scenes import ExactTransportMatcher

INPUTS = batch(SIZES, [3, 2])
STAGES = 4
PLAIN = options("NUM_HEADS", STAGES, "NUM_PROPOSALS", 7)
SIX = options("NUM_HEADS", 6)
both_matchings = pytest.mark.parametrize("matching", [(), DLA], ids=["Hungarian", "DLA"])


def sqr(*opts):
    """Four stages with recollection; `opts` are keys of SQR and values."""
    return [*PLAIN, *enable("SQR", *opts)]


def model_of(*opts):
    return float32_model(*opts).double()


def inputs_of(images):
    """Features and proposals that need no backbone, leaves to differentiate by."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.rand(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    features = [draw(images, 32, 24 // 2**i, 24 // 2**i).requires_grad_() for i in range(4)]
    corner = draw(images, 7, 2) * 50
    boxes = torch.cat([corner, corner + 8 + draw(images, 7, 2) * 40], dim=-1).requires_grad_()
    return features, Proposals(boxes, (draw(images, 7, 32) - 0.5).requires_grad_())


def recollected(model, inputs):
    return model.head(*inputs, recollect=True)


def targets_of(counts):
    sizes = [(96, 96)] * len(counts)
    pixels = size_tensor(sizes, torch.device("cpu")).double()
    return Targets.from_inputs(batch(sizes, counts), pixels)


def losses_of(model, predictions):
    """With 2 ground truths in the first image, then 3, 0, 1."""
    targets = targets_of([(i + 2) % 4 for i in range(predictions.boxes.shape[1])])
    return model.criterion(predictions, targets, model.matcher(predictions, targets))


def loss_and_gradients(model, inputs, groups):
    """The summed losses of all groups, and their gradients by inputs and parameters."""
    loss = sum(sum(losses_of(model, group).values()) for group in groups)
    leaves = [*inputs[0], *inputs[1], *model.head.parameters()]
    return loss, *torch.autograd.grad(loss, leaves, materialize_grads=True)


def plain_sets(predictions):
    """Indices of the plain cascade, the last set of every stage."""
    stages = predictions.stage.tolist()
    return [i for i, stage in enumerate(stages) if stage not in stages[i + 1 :]]


@both_matchings
@pytest.mark.parametrize(("images", "opts"), [
    *((n, ("START", s)) for n in (1, 2, 3, 4) for s in (1, 2)), (2, ("MODE", "dense")),
])  # fmt: skip
def test_all_groups_at_once_agree_with_a_loop_over_groups(images, opts, matching):
    model, inputs = model_of(*sqr(*opts), *matching), inputs_of(images)
    results = loss_and_gradients(model, inputs, [recollected(model, inputs)])
    loop = refine_by_loop(model.head, *inputs, model.head.windows)
    expected = loss_and_gradients(model, inputs, loop)
    torch.testing.assert_close(results[0], expected[0], rtol=1e-12, atol=0)
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * max(1, b.abs().max().item()))


@pytest.mark.parametrize(("chunk", "checkpoint"), [(1, False), (2, False), (0, True), (2, True)])
def test_chunks_and_checkpointing_change_no_gradient(chunk, checkpoint):
    results = []
    for opts in ((), ("CHUNK", chunk, "ACTIVATION_CHECKPOINT", checkpoint)):
        model, inputs = model_of(*sqr(*opts)), inputs_of(2)
        results.append(loss_and_gradients(model, inputs, [recollected(model, inputs)]))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("opts", [(), ("MODE", "dense"), ("CHUNK", 1)])
def test_the_last_group_of_every_stage_is_the_plain_cascade(opts):
    inputs = inputs_of(2)
    expected = model_of(*PLAIN).head(*inputs)
    predictions = recollected(model_of(*sqr(*opts)), inputs)
    sets = plain_sets(predictions)
    assert predictions.stage[sets].tolist() == expected.stage.tolist() == [0, 1, 2, 3]
    # One call for several groups multiplies larger matrices, which rounds differently.
    for a, b in zip(predictions[:2], expected[:2], strict=True):
        torch.testing.assert_close(a[sets], b, rtol=0, atol=0 if opts == ("CHUNK", 1) else 1e-12)


def test_losses_of_a_stage_train_the_features_of_earlier_stages_but_not_their_boxes():
    model = model_of(*sqr())
    losses = losses_of(model, recollected(model, inputs_of(2)))
    for late in range(1, STAGES):
        suffix = "" if late == STAGES - 1 else f"_{late}"
        loss = sum(losses[f"loss_{name}{suffix}"] for name in ("ce", "bbox", "giou"))
        for earlier in model.head.head_series[:late]:
            boxes = [*earlier.bboxes_delta.parameters(), *earlier.reg_module.parameters()]
            content = [earlier.linear1.weight, earlier.inst_interact.dynamic_layer.weight]
            of_boxes, of_content = (
                torch.autograd.grad(loss, x, retain_graph=True, materialize_grads=True)
                for x in (boxes, content)
            )
            assert not any(g.any() for g in of_boxes)
            assert all(g.abs().max() > 0 for g in of_content)


def test_initial_boxes_get_gradients_from_the_first_stage_only_and_features_from_all():
    model, inputs = model_of(*sqr()), inputs_of(1)
    predictions = recollected(model, inputs)
    for stage in range(STAGES):
        total = predictions.boxes[predictions.stage == stage].sum()
        options = {"retain_graph": True, "materialize_grads": True}
        boxes, features = torch.autograd.grad(total, inputs[1], **options)
        assert boxes.any() == (stage == 0)
        assert features.any()


def test_every_group_matches_every_object_once():
    model = model_of(*sqr(), *SIX)
    predictions = recollected(model, inputs_of(2))
    groups = [1, 2, 3, 5, 8, 13]
    assert predictions.stage.tolist() == [t for t, count in enumerate(groups) for _ in range(count)]
    positives = (model.matcher(predictions, targets_of([3, 2])) >= 0).sum(dim=2)
    assert positives.tolist() == [[3, 2]] * 32


def test_units_depend_on_the_stage_of_a_group_and_not_on_its_route():
    opts = [*sqr(), *SIX, *enable("DLA", "STATIC_UNITS", 5)]
    predictions = recollected(model_of(*opts), inputs_of(1))
    matcher = ExactTransportMatcher(tiny_cfg(*opts))
    positives = (matcher(predictions, targets_of([1])) >= 0).sum(dim=(1, 2)).tolist()
    assert positives == [int(5 - 0.5 * (5 - stage)) for stage in predictions.stage.tolist()]
    assert sum(positives) == 1 * 2 + 2 * 3 + 3 * 3 + 5 * 4 + 8 * 4 + 13 * 5
    assert sum(positives[i] for i in plain_sets(predictions)) == 2 + 3 + 3 + 4 + 4 + 5


def test_without_recollection_training_is_bitwise_that_of_the_plain_cascade():
    results = []
    disabled = sqr("START", 2, "MODE", "dense", "CHUNK", 1, "ENABLED", False)
    for opts in (PLAIN, sqr("START", STAGES), disabled):
        model = float32_model(*opts)
        losses = train_step(model, INPUTS)
        gradients = (p.grad for p in model.parameters() if p.requires_grad)
        results.append([*losses.values(), *gradients])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    "opts", [(), ("START", 3), ("MODE", "dense"), ("CHUNK", 1, "ACTIVATION_CHECKPOINT", True)]
)
def test_inference_and_keys_are_those_of_the_plain_cascade(opts):
    plain, model = model_of(*PLAIN).eval(), model_of(*sqr(*opts)).eval()
    assert list(plain.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        expected, results = plain(INPUTS), model(INPUTS)
    for a, b in zip(expected, results, strict=True):
        a, b = a["instances"], b["instances"]
        assert torch.equal(a.scores, b.scores)
        assert torch.equal(a.pred_classes, b.pred_classes)
        assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)


@torch.no_grad()
def test_training_mode_and_context_decide_about_recollection():
    model = model_of(*sqr())
    count = lambda **keywords: len(model.raw_predictions(INPUTS, **keywords)[0].stage)  # noqa: E731
    assert count() == 1 + 2 + 3 + 5
    with use_training_context(recollect=False):
        assert count() == STAGES
    model.eval()
    assert count() == 1
    assert count(all_stages=True) == STAGES
    assert len(model.train().head(*inputs_of(1)).stage) == STAGES  # the default


@pytest.mark.parametrize("opts", [
    DLA, enable("DLA", "MATCHER", "SimOTAMatcher"), enable("DPG"), [*DLA, *enable("DPG")],
    options("USE_FOCAL", False), ["MODEL.ACTIVATION_CHECKPOINT", ("stages",)],
])  # fmt: skip
@pytest.mark.parametrize("half", [False, True])
def test_recollection_trains_with(opts, half):
    model = float32_model(*sqr(), *opts)
    for counts in ([3, 2], [0, 1]):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            assert len(train_step(model, batch(SIZES, counts))) == 3 * STAGES


@both_matchings
@pytest.mark.parametrize("in_parts", [False, True])
def test_the_log_has_the_losses_of_the_plain_cascade_also_for_a_batch_in_parts(matching, in_parts):
    inputs = batch([SIZES[0]] * 2, [3, 2])  # one size, or parts are padded less
    expected = model_of(*PLAIN, *matching)(inputs)
    model = model_of(*sqr(), *matching)
    parts = [[x] for x in inputs] if in_parts else [inputs]
    for _ in range(2):  # sums start anew with every iteration
        with EventStorage(19) as storage:
            normalizers = model.loss_normalizers(parts) if in_parts else None
            for part in parts:
                last = part is parts[-1]
                with use_training_context(normalizers=normalizers, ends_iteration=last):
                    model(part)
                logged = {k: v for k, (v, _) in storage.latest().items() if "plain/" in k}
                assert bool(logged) == last
    assert logged.pop("plain/total_loss") == pytest.approx(sum(expected.values()).item())
    assert logged == {f"plain/{k}": pytest.approx(v.item()) for k, v in expected.items()}


@pytest.mark.parametrize(("opts", "iteration"), [(sqr(), 5), (PLAIN, 19)])
def test_plain_losses_are_logged_every_period_and_with_recollection_only(opts, iteration):
    with EventStorage(iteration) as storage:
        model_of(*opts)(INPUTS)
    assert not storage.latest()
