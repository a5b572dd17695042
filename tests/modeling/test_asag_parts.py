"""ASAG's generator, queries and decoders: properties that do not depend on weights."""

import pytest
import torch

from dsrcnn.modeling.asag.anchor_generator import AnchorGenerator, ProbingRule
from dsrcnn.modeling.asag.patches import RelativeTargets, TrainingPatches
from dsrcnn.modeling.asag.queries import (
    AdaMixerDecoders,
    InitialQueries,
    RCNNDecoders,
    attention_mask,
    noisy_queries,
)
from dsrcnn.modeling.decoder import AdaMixerStage, RCNNHead, RoIFeatures, StageSettings

ALWAYS_PROBE = {"low": 0.0, "high": 1.0, "output": 0.05}
SETTINGS = StageSettings(16, 3, 2, 8, 1, 3, "gelu")
LARGE = torch.tensor([[320.0, 256] * 2] * 2)


def small_generator(**rule):
    torch.manual_seed(0)
    return AnchorGenerator(
        channels=16, hidden=32, fixed_anchors=6, probed_anchors=4, rule=ProbingRule(**rule)
    ).eval()


def small_features(images, height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(images, 16, -(-height // s), -(-width // s)) for s in (8, 16, 32)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def shrink_probed_anchors(generator):
    """Untrained, they are large and in the middle of their patch; then small and at its corner."""
    generator.proj_patch.layers[2].bias.data.view(-1, 5)[:, :4] = -3.0
    return generator


def training_patches(images, **settings):
    boxes = [torch.tensor([[20.0, 20, 50, 40]])] * images
    return TrainingPatches(boxes, torch.tensor([[160.0, 128] * 2] * images), **settings)


def test_good_anchors_are_not_probed():
    generator = small_generator(high=0.0)
    anchors, _, probed = generator(small_features(2, 96, 128), torch.tensor([[128.0, 96] * 2] * 2))
    assert not probed
    assert anchors.mask.any()
    assert not anchors.boxes.requires_grad


def test_padding_of_the_batch_does_not_change_anchors():
    generator = small_generator(levels=0)  # patches of finer levels may reach beyond small images
    sizes = torch.tensor([[160.0, 128] * 2, [96.0, 128] * 2])
    features = small_features(2, 128, 160)
    expected, _, _ = generator(features, sizes)
    for level, stride in zip(features, (8, 16, 32), strict=True):
        level[1, :, :, 96 // stride + 1 :] += 3.0  # a cell further, for the convolution
    anchors, _, _ = generator(features, sizes)
    assert torch.equal(anchors.mask, expected.mask)
    torch.testing.assert_close(anchors.boxes, expected.boxes)


def test_a_limit_keeps_the_best_patches_of_every_image():
    features = small_features(2, 256, 320)
    counts, best = [], []
    for limit in (0, 1):
        _, _, probed = small_generator(**ALWAYS_PROBE, max_patches=limit)(features, LARGE)
        level = probed[0]
        counts.append(level.images.bincount().tolist())
        best.append([level.positions[level.images == i][:1] for i in range(2)])
    assert min(counts[0]) > 1
    assert counts[1] == [1, 1]
    assert all(map(torch.equal, *best))


def test_training_probes_both_levels_and_reaches_every_parameter():
    generator = small_generator(high=0.0).train()  # without training patches nothing is probed
    sizes, features = torch.tensor([[160.0, 128] * 2] * 2), small_features(2, 128, 160)
    anchors, fixed, probed = generator(features, sizes, training_patches(2))
    assert fixed.whole.shape[1] == 4
    assert [len(level.images) for level in probed] == [8, 8]
    assert all(level.train_only.all() for level in probed)
    sum(x.sum() for x in (*fixed, *(level.predictions for level in probed))).backward()
    assert all(p.grad is not None for p in generator.parameters())
    expected, _, _ = generator.eval()(features, sizes)  # training patches output no anchors
    torch.testing.assert_close(anchors.boxes, expected.boxes, rtol=1e-4, atol=1e-3)


def test_guided_patches_add_anchors_and_replace_none():
    generator = shrink_probed_anchors(small_generator(**{**ALWAYS_PROBE, "output": 0.0})).train()
    generator.proj_patch.layers[2].weight.data.zero_()
    sizes, features = torch.tensor([[160.0, 128] * 2] * 2), small_features(2, 128, 160)
    anchors, _, probed = generator(features, sizes, training_patches(2, guided=True))
    assert [int((~level.train_only).sum()) for level in probed] == [2, 2]
    generator.rule = generator.rule._replace(levels=0)
    fixed, _, _ = generator(features, sizes, training_patches(2))
    count = fixed.mask.sum(dim=1)
    for image, number in enumerate(count.tolist()):
        torch.testing.assert_close(anchors.boxes[image, :number], fixed.boxes[image, :number])
    assert (anchors.mask.sum(dim=1) - count).tolist() == [8, 8]  # four of a patch, two levels


def test_training_also_predicts_on_the_flipped_whole_image():
    generator = small_generator().train()
    inputs = []
    generator.layernorm[0].register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    generator(small_features(1, 96, 128), torch.tensor([[128.0, 96] * 2]), training_patches(1))
    patches = inputs[0].unflatten(2, (15, 15))  # (1, 8, rows, columns, channels)
    assert patches.shape[1] == 8
    assert torch.equal(patches[:, 5], patches[:, 4].flip(2))
    assert torch.equal(patches[:, 6], patches[:, 4].flip(1))
    assert torch.equal(patches[:, 7], patches[:, 4].flip(1, 2))


def test_norms_start_as_the_identity():
    norms = small_generator().layernorm
    assert all((norm.weight == 1).all() and not norm.bias.any() for norm in norms)


@pytest.mark.parametrize("kind", [AdaMixerDecoders, RCNNDecoders])
def test_all_decoders_are_trained_and_one_is_used_in_inference(kind):
    torch.manual_seed(0)
    if kind is AdaMixerDecoders:
        stage = AdaMixerStage(settings=SETTINGS, groups=2, in_points=3, out_points=4)
    else:
        stage = RCNNHead(settings=SETTINGS, dynamic_channels=4, roi_positions=4)
    rois = RoIFeatures(strides=(4, 8), resolution=2, aligned=False)
    decoders = kind(stage=stage, channels=16, pooler=rois, count=3, used=-2, prior_probability=0.01)
    pyramid = [torch.randn(2, 16, 16, 16), torch.randn(2, 16, 8, 8)]
    boxes = torch.tensor([8.0, 8, 40, 30]).expand(2, 5, 4).clone().requires_grad_()
    features = torch.randn(2, 5, 16, requires_grad=True)
    queries = InitialQueries(torch.zeros(2, 5, 3), boxes, features)
    trained = decoders.train()(pyramid, rois.prepare(pyramid), queries)
    assert trained.logits.shape == (3, 2, 5, 3)
    assert trained.stage.tolist() == [0, 1, 2]
    torch.testing.assert_close(trained.boxes, boxes.expand(3, -1, -1, -1), rtol=1e-4, atol=1e-3)
    (trained.logits.sum() + trained.boxes.sum()).backward()
    assert boxes.grad is None
    assert features.grad.abs().sum() > 0
    used = decoders.eval()(pyramid, rois.prepare(pyramid), queries)
    assert used.stage.tolist() == [1]
    torch.testing.assert_close(used.logits[0], trained.logits[1])


def targets(*counts):
    """Ground truths of several images, padded."""
    most = max(counts)
    boxes = torch.rand(len(counts), most, 4, generator=torch.Generator().manual_seed(1)) * 0.2 + 0.4
    mask = torch.arange(most) < torch.tensor(counts).unsqueeze(1)
    return RelativeTargets(boxes, torch.zeros(len(counts), most, dtype=torch.int64), mask)


def test_ground_truths_are_repeated_as_often_as_they_fit_or_not_used_at_all():
    noisy = noisy_queries(targets(2, 3), 5)
    assert noisy.assignment.tolist() == [[0, 1, 0, 1, -1], [0, 1, 2, -1, -1]]
    assert noisy.group.tolist() == [[0, 0, 1, 1, -1], [0, 0, 0, -1, -1]]
    assert (noisy.boxes[noisy.group < 0] == torch.tensor([0.5, 0.5, 1.0, 1.0])).all()
    for counts, used in (((0, 0), [0, 0]), ((0, 3), [0, 1]), ((6, 1), [0, 1])):
        assert (noisy_queries(targets(*counts), 5).assignment >= 0).any(dim=1).tolist() == used


def test_noise_is_bounded_by_the_box_and_the_image():
    torch.manual_seed(0)
    clean = targets(1)
    boxes = noisy_queries(clean, 2000).boxes[0]
    center, size = clean.boxes[0, 0].split(2)
    for relative in ((boxes[:, :2] - center) / (size / 2), (boxes[:, 2:] - size) / size):
        assert 0.35 < relative.abs().max() <= 0.4 + 1e-5
    large = clean._replace(boxes=torch.tensor([[[0.9, 0.5, 0.9, 1.0]]]))
    assert noisy_queries(large, 500).boxes.max() <= 1


def test_denoising_queries_are_hidden_from_anchors_and_other_repetitions():
    valid = torch.tensor([[True, True, False]])
    mask = attention_mask(valid, noisy_queries(targets(2), 5).group)[0].int()
    expected = "11000110 11000110 00110110 00110110 00001110 00000110 00000110 00000111"
    assert ["".join(map(str, row)) for row in mask.tolist()] == expected.split()
