"""Deformable DETR as a stage and as a detector, with and without recollection."""

import math

import pytest
import torch
from conftest import batch
from detectors import (
    DLA,
    SETTINGS,
    SIZES,
    SQR,
    deformable_detr_of,
    enable,
    options,
    train_step,
)
from detectron2.modeling import build_model
from torch import nn

from benchmarks.recollection import refine_by_loop
from dsrcnn.config import check_config, read_cfg
from dsrcnn.errors import ConfigError
from dsrcnn.layers.deformable_attention import TokenPyramid
from dsrcnn.modeling.decoder import DeformableStage
from dsrcnn.modeling.decoder.deformable import box_network, move_boxes
from dsrcnn.modeling.encoder import DeformableEncoder
from dsrcnn.solver import build_optimizer
from dsrcnn.structures import Targets, box_cxcywh_to_xyxy, box_xyxy_to_cxcywh
from dsrcnn.utils.training import use_training_context

PLAIN = ["MODEL.DeformableDETR.BOX_REFINEMENT", False]
TWO_STAGES = options("PROPOSALS.NAME", "EncoderQueries")
each_variant = pytest.mark.parametrize(
    "opts", [[], PLAIN, TWO_STAGES], ids=["refinement", "plain", "two stages"]
)


def cfg_of(*opts):
    small = ["MODEL.DEVICE", "cpu", *options("NUM_CLASSES", 5, "NUM_PROPOSALS", 8)]
    return read_cfg("quick/deformable_detr_shapes", [*small, *opts])


def model_of(*opts):
    return deformable_detr_of(*opts).train()


def trained_model_of(*opts):
    """A model whose parameters are all different from their start."""
    model = model_of(*opts)
    with torch.no_grad():
        for parameter in nn.ModuleList([model.encoder, model.proposals, model.head]).parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def encoder():
    torch.manual_seed(0)
    model = DeformableEncoder(
        settings=SETTINGS, levels=3, num_layers=2, dropout=0.0, checkpoint=False, compile_mode=""
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.double().eval()


def stage_and_inputs():
    """A stage, encoded tokens of two images, boxes and points of three groups."""
    torch.manual_seed(0)
    stage = DeformableStage(settings=SETTINGS, levels=3, dropout=0.0).double().eval()
    for parameter in stage.parameters():
        nn.init.normal_(parameter, std=0.2)
    maps = [torch.randn(2, 16, n, n, dtype=torch.float64) for n in (12, 6, 3)]
    sizes = torch.tensor([[96.0, 96, 96, 96], [80, 60, 80, 60]])
    low = torch.rand(2, 3, 5, 2, dtype=torch.float64) * 30
    boxes = torch.cat([low, low + torch.rand_like(low) * 20], dim=-1)
    boxes[:, 0, :, 2:] = boxes[:, 0, :, :2]  # points
    states = torch.randn(2, 3, 5, 32, dtype=torch.float64)
    return stage, (TokenPyramid.from_levels(maps, sizes, (96, 96)), boxes, states)


def of_image(pyramid, index):
    names = ("tokens", "is_padding", "places", "covered", "sizes")
    return pyramid._replace(**{name: getattr(pyramid, name)[index] for name in names})


def test_groups_and_images_at_once_agree_with_one_by_one():
    stage, (pyramid, boxes, states) = stage_and_inputs()
    outputs = stage(pyramid, boxes, states)
    for image in (slice(0, 1), slice(1, 2)):
        for group in range(3):
            inputs = (x[image, group].unsqueeze(1) for x in (boxes, states))
            for a, b in zip(outputs, stage(of_image(pyramid, image), *inputs), strict=True):
                torch.testing.assert_close(a[image, group].unsqueeze(1), b)


def test_the_box_of_a_point_does_not_depend_on_a_size():
    """It is sigmoid(change), its center sigmoid(change + logit(point)), as published."""
    stage, (pyramid, boxes, states) = stage_and_inputs()
    for parameter in stage.bbox_embed.parameters():
        nn.init.zeros_(parameter)
    stage.start_with_small_boxes()
    _, refined, _ = stage(pyramid, boxes, states)
    sizes = pyramid.sizes.view(2, 1, 4)
    low, high = (refined[:, 0] / sizes).split(2, dim=-1)
    torch.testing.assert_close((low + high) / 2, (boxes[:, 0] / sizes)[..., :2], check_dtype=False)
    side = torch.tensor(-2.0).sigmoid().double().expand_as(low)
    torch.testing.assert_close(high - low, side, atol=1e-6, rtol=0)
    before, after = (x[:, 1, :, 2:] - x[:, 1, :, :2] for x in (boxes, refined))
    logits = torch.logit(before / sizes[..., :2]) - 2
    torch.testing.assert_close(after / sizes[..., :2], logits.sigmoid(), check_dtype=False)


@torch.no_grad()
def test_a_box_however_small_never_becomes_a_point_again():
    network = box_network(8)
    last = network[-1]
    nn.init.zeros_(last.weight)
    last.bias.data.copy_(torch.tensor([0.0, 0.0, -200.0, -20.0]))
    content, point = torch.randn(1, 8), torch.tensor([[0.5, 0.25, 0.0, 0.0]])
    moved = move_boxes(network, content, point)
    torch.testing.assert_close(moved, torch.tensor([[0.5, 0.25, 1e-5, 1e-5]]))
    sizes = torch.tensor([1000.0, 800.0, 1000.0, 800.0])
    again = box_xyxy_to_cxcywh(box_cxcywh_to_xyxy(moved) * sizes) / sizes
    # The logit of a hundred-thousandth, not that of a point, gets the next change.
    last.bias.data.fill_(0.0)
    last.bias.data[2] = 1.0
    side = 1 / (1 + (1e5 - 1) / math.e)
    expected = torch.tensor([[0.5, 0.25, side, 1e-5]])
    torch.testing.assert_close(move_boxes(network, content, again), expected, rtol=0.01, atol=0)


def test_encoded_tokens_of_an_image_do_not_depend_on_its_padding():
    """Not even on what lies in the padding: alone, and padded to twice the size with noise."""
    model, maps = encoder(), [torch.randn(1, 16, 2 * n, 2 * n).double() for n in (12, 6, 3)]
    alone = [x[..., : x.shape[2] // 2, : x.shape[3] // 2] for x in maps]
    sizes = torch.tensor([[96.0, 96, 96, 96]])
    expected = model(alone, sizes, (96, 96))
    padded = model(maps, sizes, (192, 192))
    tokens = padded.tokens[~padded.is_padding]
    torch.testing.assert_close(tokens, expected.tokens[0], rtol=1e-6, atol=1e-6)
    assert padded.is_padding.sum() == 3 * len(tokens)


@torch.no_grad()
@each_variant
def test_an_image_gives_the_same_predictions_alone_and_beside_others(opts):
    model = trained_model_of(*opts).eval()
    first, second = batch([(64, 96), (60, 90)], [1, 1])  # padded to the same size
    together = model.raw_predictions([first, second])[0]
    for index, inputs in enumerate((first, second)):
        alone = model.raw_predictions([inputs])[0]
        for a, b in zip(together[:2], alone[:2], strict=True):
            torch.testing.assert_close(a[:, index : index + 1], b, rtol=1e-4, atol=1e-3)


@torch.no_grad()
@each_variant
def test_padding_of_a_batch_does_not_change_proposals_and_decoder(opts):
    """From feature maps on; the network before sees the border of the padding, as everywhere."""
    model = trained_model_of(*opts).double().eval()
    sides, sizes = (12, 6, 3, 2), torch.tensor([[96.0, 96, 96, 96]])
    maps = [torch.randn(1, 64, 2 * n, 2 * n).double() for n in sides]
    results = []
    for factor in (1, 2):
        levels = [x[..., : n * factor, : n * factor] for x, n in zip(maps, sides, strict=True)]
        pyramid = model.encoder(levels, sizes, (96 * factor, 96 * factor))
        results.append(
            model.head(pyramid, model.proposals.propose(pyramid, sizes)[0], all_stages=True)
        )
    for a, b in zip(results[0][:2], results[1][:2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("opts", [
    [], PLAIN, DLA, SQR, [*PLAIN, *SQR], enable("SQR", "CHUNK", 1, "ACTIVATION_CHECKPOINT", True),
    ["MODEL.ACTIVATION_CHECKPOINT", ("stages",)], options("ACTIVATION", "gelu", "USE_FOCAL", False),
    options("DROPOUT", 0.1), enable("DLA", "MATCHER", "SimOTAMatcher"),
    TWO_STAGES, [*TWO_STAGES, *SQR], [*TWO_STAGES, *DLA],
])  # fmt: skip
def test_it_trains_and_detects_with(opts):
    model = model_of(*opts)
    count = 12 if "EncoderQueries" in opts else 9
    for counts, half in (([3, 2], False), ([0, 1], False), ([0, 0], False), ([3, 2], True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            assert len(train_step(model, batch(SIZES, counts))) == count
    assert all(len(x["instances"]) for x in model.eval()(batch(SIZES, [0, 0])))


def test_checkpointed_layers_and_stages_change_no_gradient():
    results = []
    for opts in ((), ("MODEL.ACTIVATION_CHECKPOINT", ("stages",))):
        model = model_of(*opts).double()
        train_step(model, batch(SIZES, [3, 2]))
        results.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_without_refinement_all_stages_share_their_predictions_and_points():
    model = model_of(*PLAIN)
    first, *others = model.head.head_series
    assert all(x.class_embed is first.class_embed for x in others)
    assert all(x.bbox_embed is first.bbox_embed for x in others)
    assert all(x.cross_attn is not first.cross_attn for x in others)
    own = model_of().head.head_series
    assert own[0].class_embed is not own[1].class_embed
    assert own[0].bbox_embed[-1].bias.tolist() == [0, 0, -2, -2]
    assert own[1].bbox_embed[-1].bias.tolist() == [0, 0, 0, 0]


def gradients_of_points(opts, stages):
    """Gradients of the reference points from the boxes of some stages."""
    model = trained_model_of(*opts).double()
    boxes = model.raw_predictions(batch(SIZES, [1, 1]))[0].boxes
    return torch.autograd.grad(boxes[stages].sum(), model.proposals.reference_points.weight)[0]


def test_points_learn_from_all_stages_only_without_refinement():
    assert gradients_of_points([], [0]).any()
    late = gradients_of_points(PLAIN, [1, 2])
    assert late.any()
    model = trained_model_of().double()
    boxes = model.raw_predictions(batch(SIZES, [1, 1]))[0].boxes
    deltas = model.head.head_series[0].bbox_embed[0].weight
    assert torch.autograd.grad(boxes[1].sum(), deltas, materialize_grads=True)[0].abs().sum() == 0


def test_candidates_are_the_best_tokens_inside_of_the_image():
    """Squares of a twentieth of the image, twice as large on every level, at the tokens."""
    model = model_of(*TWO_STAGES).eval()
    images = model.preprocess_image(batch(SIZES, [0, 0]))
    with torch.no_grad():
        pyramid = model.encode(images)
        proposals, candidates = model.proposals.propose(pyramid, images.sizes)
    places, usable = pyramid.places, candidates.logits[0, ..., 0] > -20
    assert torch.equal(usable, ~pyramid.is_padding)  # tokens of small maps are not at the border
    boxes = candidates.boxes[0] / images.sizes.unsqueeze(1)
    low, high = boxes.split(2, dim=-1)
    torch.testing.assert_close(((low + high) / 2)[usable], places[usable], rtol=1e-4, atol=1e-5)
    counts = torch.tensor([height * width for height, width in pyramid.shapes])
    sides = (0.05 * 2 ** torch.arange(4)).repeat_interleave(counts).view(1, -1, 1).expand_as(low)
    torch.testing.assert_close((high - low)[usable], sides[usable], rtol=1e-4, atol=1e-5)
    scores = candidates.logits[0, ..., 0].masked_fill(~usable, -99)
    best = scores.topk(8, dim=1).indices.unsqueeze(-1).expand(-1, -1, 4)
    torch.testing.assert_close(proposals.boxes, candidates.boxes[0].gather(1, best))
    assert not proposals.boxes.requires_grad


def test_tokens_that_are_excluded_never_learn_an_object():
    model = trained_model_of(*TWO_STAGES)
    inputs = batch([(32, 32), (160, 160)], [30, 1])  # more objects than tokens
    predictions, images = model.raw_predictions(inputs)
    candidates = predictions.candidates
    usable = candidates.logits[0, ..., 0] > -20
    assert usable[0].sum() < 30
    assert torch.equal(candidates.mask, usable)
    targets = Targets.from_inputs(inputs, images.sizes)
    targets = targets._replace(labels=torch.zeros_like(targets.labels))  # objects or not
    assignment = model.proposals.matcher(candidates, targets)[0]
    assert (assignment[~usable] == -1).all()
    assert (assignment[0] >= 0).sum() == usable[0].sum()


def test_an_image_of_fewer_tokens_has_as_many_queries():
    model = model_of(*TWO_STAGES, *options("NUM_PROPOSALS", 50)).eval()
    boxes = model.raw_predictions(batch([(32, 32)], [0]))[0].boxes
    assert boxes.shape[2] == 16 + 4 + 1 + 1


@pytest.mark.parametrize("opts", [[], DLA, TWO_STAGES, [*TWO_STAGES, *DLA]])
def test_gradients_of_parts_sum_to_those_of_the_batch(opts):
    model, inputs = model_of(*opts).double(), batch([(64, 96)] * 2, [3, 1])
    model.backbone.eval()  # no norms over the images of a batch
    results = []
    for parts in ([inputs], [[x] for x in inputs]):
        model.zero_grad()
        normalizers = model.loss_normalizers(parts) if len(parts) > 1 else None
        for part in parts:
            with use_training_context(normalizers=normalizers):
                sum(model(part).values()).backward()
        results.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * max(1.0, b.abs().max().item()))


def inputs_of(model, images):
    """Encoded tokens and queries as leaves, in float64."""
    sizes = [(64, 96), (96, 64), (80, 80), (70, 90)][:images]
    prepared = model.preprocess_image(batch(sizes, [0] * images))
    prepared = prepared._replace(tensor=prepared.tensor.double())
    with torch.no_grad():
        pyramid = model.encode(prepared)
        proposals = model.proposals.propose(pyramid, prepared.sizes)[0]
    pyramid = pyramid._replace(tokens=pyramid.tokens.requires_grad_())
    return pyramid, type(proposals)(*(x.clone().requires_grad_() for x in proposals))


def loss_and_gradients(model, inputs, groups):
    sizes = inputs[0].sizes.double()
    shapes = [(int(h), int(w)) for w, h in sizes[:, :2]]
    counts = [(i + 2) % 4 for i in range(len(sizes))]
    targets = Targets.from_inputs(batch(shapes, counts), sizes)
    loss = 0.0
    for group in groups:
        assignment = model.matcher(group, targets)
        loss = loss + sum(model.criterion(group, targets, assignment).values())
    leaves = [inputs[0].tokens, *inputs[1], *model.head.parameters()]
    return loss, *torch.autograd.grad(loss, leaves, materialize_grads=True)


@each_variant
@pytest.mark.parametrize("images", [1, 2, 3])
def test_all_groups_at_once_agree_with_a_loop_over_groups(images, opts):
    """For any number of images: the published code is right for two only."""
    model = trained_model_of(*SQR, *opts).double()
    inputs = inputs_of(model, images)
    results = loss_and_gradients(model, inputs, [model.head(*inputs, recollect=True)])
    loop = refine_by_loop(model.head, *inputs, model.head.windows)
    expected = loss_and_gradients(model, inputs, loop)
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * max(1, b.abs().max().item()))


@each_variant
def test_with_recollection_the_last_group_of_every_stage_is_the_plain_cascade(opts):
    inputs = batch(SIZES, [3, 2])
    expected, predictions = (
        trained_model_of(*x, *opts).double().raw_predictions(inputs)[0] for x in ([], SQR)
    )
    assert predictions.stage.tolist() == [0, 1, 1, 2, 2, 2]
    for a, b in zip(predictions[:2], expected[:2], strict=True):
        torch.testing.assert_close(a[[0, 2, 5]], b, rtol=0, atol=1e-9)


@each_variant
def test_without_recollection_training_is_bitwise_that_of_the_plain_cascade(opts):
    results = []
    for other in ([], enable("SQR", "START", 3), [*SQR, *options("SQR.ENABLED", False)]):
        model = trained_model_of(*opts, *other)
        losses = train_step(model, batch(SIZES, [3, 2]))
        results.append([*losses.values(), *(p.grad for p in model.parameters())])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)
    plain, recollecting = (trained_model_of(*opts, *x).eval() for x in ([], SQR))
    assert list(plain.state_dict()) == list(recollecting.state_dict())
    with torch.no_grad():
        a, b = (x.raw_predictions(batch(SIZES, [1, 1]))[0] for x in (plain, recollecting))
    assert torch.equal(a.logits, b.logits)
    assert torch.equal(a.boxes, b.boxes)


def test_l1_compares_centers_and_sizes_in_loss_and_cost():
    model = model_of()
    assert model.criterion.l1_of_centers
    assert model.matcher.costs.l1_of_centers
    assert model_of(*DLA).matcher.costs.l1_of_centers


def test_the_best_scores_of_all_queries_and_classes_are_kept_without_nms():
    model = model_of().eval()
    assert model.detection.nms_threshold is None
    assert model_of(*SQR, *options("NMS.ENABLED", False)).detection.nms_threshold is None


def test_points_are_learned_at_a_tenth_of_the_rate():
    cfg = cfg_of("SOLVER.BASE_LR", 1e-3)
    model = build_model(cfg)
    names = {id(p): n for n, p in model.named_parameters()}
    groups = build_optimizer(cfg, model).param_groups
    rates = {names[id(p)]: g["lr"] for g in groups for p in g["params"]}
    slow = {n for n, rate in rates.items() if rate == pytest.approx(1e-4)}
    assert len(slow) == 2 * (1 + 2 + 3)
    assert all("sampling_offsets" in n or "reference_points" in n for n in slow)


@pytest.mark.parametrize(("opts", "words"), [
    (enable("DPG"), "DPG.ENABLED is True, but DeformableDETR has no learned boxes"),
    (options("PROPOSALS.NAME", "LearnedProposals"), "PROPOSALS.NAME is 'LearnedProposals'"),
    ([*TWO_STAGES, *PLAIN], "BOX_REFINEMENT is False"),
    (["MODEL.DeformableDETR.ENCODER_LAYERS", -1], "ENCODER_LAYERS is -1"),
    ([*options("HIDDEN_DIM", 34, "NHEADS", 2), "MODEL.FPN.OUT_CHANNELS", 34],
     "HIDDEN_DIM is 34; .* Write a multiple of 4"),
    (options("BOX_WEIGHTS", (10.0, 10.0, 5.0, 5.0)), "BOX_WEIGHTS is .* no effect"),
    (options("PROPOSALS.BOXES", "grid"), "BOXES is 'grid', which has no effect.*BOXES image"),
    (options("NUM_CLS", 2), "NUM_CLS is 2, which has no effect"),
    (options("NUM_REG", 2), "NUM_REG is 2, which has no effect"),
])  # fmt: skip
def test_values_that_cannot_work_are_refused(opts, words):
    with pytest.raises(ConfigError, match=words):
        check_config(cfg_of(*opts))


@each_variant
def test_detecting_in_inference_mode_does_not_keep_training_from_its_constants(opts):
    model, inputs = model_of(*opts), batch(SIZES, [2, 1])
    with torch.inference_mode():
        model.eval()(inputs)
    train_step(model.train(), inputs)


@pytest.mark.parametrize("layers", [0, 1])
def test_a_detector_tells_whether_all_of_its_parameters_are_trained(layers):
    """Several processes must know: without an encoder, its embeddings of levels are unused."""
    model = deformable_detr_of("MODEL.DeformableDETR.ENCODER_LAYERS", layers)
    sum(model(batch(SIZES, [2, 3])).values()).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert model.all_parameters_get_gradients == all(p.grad is not None for p in trained)
    assert model.all_parameters_get_gradients == (layers > 0)
