"""ASAG's generator, initializer and decoders: what holds whatever their weights."""

import pytest
import torch

from dsrcnn.modeling.asag import (
    AnchorGenerator,
    InitialQueries,
    ParallelDecoders,
    PatchLessons,
    ProbingRule,
    QueryInitializer,
    attention_mask,
)
from dsrcnn.modeling.asag.patches import (
    PatchCompressor,
    crop_positions,
    cut_patches,
    from_patches,
    rank_in_group,
    resize_valid,
    thinned,
)
from dsrcnn.modeling.decoder import AdaMixerStage, RCNNHead, RoIFeatures


def small_generator(**rule):
    torch.manual_seed(0)
    return AnchorGenerator(
        channels=16, hidden=32, fixed_anchors=6, probed_anchors=4, rule=ProbingRule(**rule)
    ).eval()


def small_features(images, height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(images, 16, -(-height // s), -(-width // s)) for s in (8, 16, 32)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def everything_is_worth_a_look():
    return {"low": 0.0, "high": 1.0, "output": 0.05, "overlap": 1.0}


def test_good_anchors_are_not_looked_at_again():
    generator = small_generator(high=0.0)
    anchors, _, probed = generator(small_features(2, 96, 128), torch.tensor([[128.0, 96] * 2] * 2))
    assert not probed
    assert anchors.mask.any()
    assert not anchors.boxes.requires_grad


@pytest.mark.parametrize(("height", "width"), [(64, 64), (96, 250), (224, 224)])
def test_images_smaller_than_a_patch_are_probed(height, width):
    generator = small_generator(**everything_is_worth_a_look())
    sizes = torch.tensor([[float(width), height, width, height]])
    # Untrained, probed anchors are in the middle of their patch, outside of so small an image, and
    # too large for the finer level.
    generator.proj_patch.layers[2].bias.data.view(-1, 5)[:, :4] = -3.0
    anchors, _, probed = generator(small_features(1, height, width), sizes)
    assert len(probed) == 2
    for level in probed:
        assert (level.positions >= 0).all()
        assert torch.isfinite(level.predictions).all()
    assert anchors.mask.all()


def test_a_permuted_batch_has_permuted_anchors():
    generator = small_generator(**everything_is_worth_a_look())
    features = small_features(3, 128, 160)
    sizes = torch.tensor([[160.0, 128] * 2, [128.0, 128] * 2, [150.0, 100] * 2])
    order = [2, 0, 1]
    first, _, _ = generator(features, sizes)
    second, _, _ = generator([x[order] for x in features], sizes[order])
    for place, image in enumerate(order):
        a, b = first.boxes[image][first.mask[image]], second.boxes[place][second.mask[place]]
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


def test_what_lies_outside_of_an_image_changes_no_anchor():
    generator = small_generator(levels=0)  # patches of finer levels may reach beyond small images
    sizes = torch.tensor([[160.0, 128] * 2, [96.0, 128] * 2])
    features = small_features(2, 128, 160)
    expected, _, _ = generator(features, sizes)
    for level, stride in zip(features, (8, 16, 32), strict=True):
        level[1, :, :, 96 // stride + 1 :] += 3.0  # a cell further, for the convolution
    found, _, _ = generator(features, sizes)
    assert torch.equal(found.mask, expected.mask)
    torch.testing.assert_close(found.boxes, expected.boxes)


def test_a_patch_limit_keeps_the_best_of_every_image():
    options = everything_is_worth_a_look()
    generator = small_generator(**options, max_patches=2)
    _, _, probed = generator(small_features(2, 128, 160), torch.tensor([[160.0, 128] * 2] * 2))
    assert all(level.images.bincount().tolist() == [2, 2] for level in probed)


def test_images_with_few_anchors_worth_a_look_are_not_probed():
    generator = small_generator(**{**everything_is_worth_a_look(), "low": 0.5})
    features, sizes = small_features(2, 128, 160), torch.tensor([[160.0, 128] * 2] * 2)
    _, _, probed = generator(features, sizes)
    candidates = generator._fixed_candidates(generator._predict_fixed(features[2], sizes), sizes)
    chosen = generator._worth_a_look(candidates, 16, 2, None)
    few, many = sorted(candidates.images[chosen].bincount(minlength=2).tolist())
    assert few < many
    generator.rule = generator.rule._replace(min_chosen=few + 1)
    _, _, stopped = generator(features, sizes)
    assert probed[0].images.unique().tolist() == [0, 1]
    assert len(stopped[0].images.unique()) == 1
    generator.rule = generator.rule._replace(min_chosen=many + 1)
    assert not generator(features, sizes)[2]


@pytest.mark.parametrize(("height", "width"), [(20, 30), (9, 40), (15, 15)])
def test_windows_of_the_compressed_map_are_the_same_as_the_map_in_windows(height, width):
    torch.manual_seed(0)
    net, level = PatchCompressor(16, 4), torch.randn(2, 16, height, width)
    images = torch.tensor([0, 1, 1])
    positions = torch.tensor([[0, 0], [max(width - 15, 0), max(height - 15, 0)], [2, 0]])
    whole = cut_patches(net(level), images, positions, 15)
    level = torch.cat([level, level.new_zeros(40, 16, height, width)])  # few patches of many cells
    windows = net.patches(level, images, positions, 15)
    torch.testing.assert_close(windows, whole, rtol=1e-4, atol=1e-5)
    again = net.patches(level[:2], images.repeat(40), positions.repeat(40, 1), 15)
    torch.testing.assert_close(again[:3], whole, rtol=1e-4, atol=1e-5)


def test_valid_parts_are_resized_as_each_by_itself():
    level = torch.randn(3, 4, 9, 11)
    sizes = torch.tensor([[11, 9], [7, 9], [1, 2]])
    found = resize_valid(level, sizes, 30)
    for image, (width, height) in enumerate(sizes.tolist()):
        part = level[image : image + 1, :, :height, :width]
        expected = torch.nn.functional.interpolate(part, (30, 30), mode="bilinear")
        torch.testing.assert_close(found[image : image + 1], expected, rtol=1e-4, atol=1e-5)


def test_ranks_count_members_of_the_same_group():
    assert rank_in_group(torch.tensor([3, 0, 3, 3, 0, 1])).tolist() == [0, 0, 1, 2, 1, 0]
    assert rank_in_group(torch.zeros(0, dtype=torch.int64)).tolist() == []


def lessons(images, **settings):
    boxes = [torch.tensor([[20.0, 20, 50, 40]])] * images
    return PatchLessons(boxes, torch.tensor([[160.0, 128] * 2] * images), **settings)


def test_in_training_both_levels_are_probed_and_every_parameter_learns():
    generator = small_generator(high=0.0).train()  # probing by itself would choose nothing
    sizes = torch.tensor([[160.0, 128] * 2] * 2)
    anchors, fixed, probed = generator(small_features(2, 128, 160), sizes, lessons(2))
    assert fixed.whole.shape[1] == 4
    assert [len(level.images) for level in probed] == [8, 8]
    assert all(level.spare.all() for level in probed)
    sum(x.sum() for x in (*fixed, *(level.predictions for level in probed))).backward()
    assert all(p.grad is not None for p in generator.parameters())
    still, _, _ = generator.eval()(small_features(2, 128, 160), sizes)
    # Patches that are there to learn gave nothing.
    torch.testing.assert_close(anchors.boxes, still.boxes, rtol=1e-4, atol=1e-3)


def test_guided_patches_give_out_anchors_and_replace_none():
    generator = small_generator(**{**everything_is_worth_a_look(), "output": 0.0}).train()
    generator.proj_patch.layers[2].weight.data.zero_()
    generator.proj_patch.layers[2].bias.data.view(-1, 5)[:, :4] = -3.0  # small, in the image
    sizes = torch.tensor([[160.0, 128] * 2] * 2)
    features = small_features(2, 128, 160)
    anchors, _, probed = generator(features, sizes, lessons(2, guided=True))
    used = [int((~level.spare).sum()) for level in probed]
    assert used == [2, 2]
    generator.rule = generator.rule._replace(levels=0)
    fixed, _, _ = generator(features, sizes, lessons(2))
    count = fixed.mask.sum(dim=1)
    for image in range(2):
        torch.testing.assert_close(
            anchors.boxes[image, : count[image]], fixed.boxes[image, : count[image]]
        )
    assert (anchors.mask.sum(dim=1) - count).tolist() == [8, 8]  # four of a patch, two levels


def test_in_training_the_patch_of_the_whole_image_is_also_seen_flipped():
    generator = small_generator().train()
    seen = []
    generator.layernorm[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    generator(small_features(1, 96, 128), torch.tensor([[128.0, 96] * 2]), lessons(1))
    patches = seen[0].unflatten(2, (15, 15))  # (1, 8, rows, columns, channels)
    assert patches.shape[1] == 8
    assert torch.equal(patches[:, 5], patches[:, 4].flip(2))
    assert torch.equal(patches[:, 6], patches[:, 4].flip(1))
    assert torch.equal(patches[:, 7], patches[:, 4].flip(1, 2))


def test_norms_start_at_rest_unless_asked_otherwise():
    plain, official = (
        AnchorGenerator(channels=16),
        AnchorGenerator(channels=16, norms_at_random=True),
    )
    assert all((norm.weight == 1).all() and not norm.bias.any() for norm in plain.layernorm)
    bound = (6 / (225 + 8)) ** 0.5
    for norm in official.layernorm:
        for x in (norm.weight, norm.bias):
            assert 0.9 * bound < x.abs().max() <= bound


def test_crop_positions_by_hand():
    sizes = torch.tensor([[1333.0, 800]])
    for centre, coarse, fine in (
        ((720, 520), [37, 25], [82, 57]),
        ((20, 20), [0, 0], [0, 0]),
        ((1320, 820), [69, 35], [152, 85]),
    ):
        place = torch.tensor([centre]).float()
        assert crop_positions(place, sizes, 16, 15).tolist() == [coarse]
        assert crop_positions(place, sizes, 8, 15).tolist() == [fine]


def test_patches_are_windows_row_after_row():
    level = torch.arange(2 * 3 * 6 * 8).view(2, 3, 6, 8).float()
    found = cut_patches(level, torch.tensor([1, 0]), torch.tensor([[2, 1], [0, 3]]), 3)
    assert found.shape == (2, 9, 3)
    expected = level[1, :, 1:4, 2:5].flatten(1).T
    assert torch.equal(found[0], expected)
    # A map of four cells below a patch of five: zeros behind.
    small = cut_patches(level[..., :4], torch.tensor([0]), torch.tensor([[0, 0]]), 5)
    assert torch.equal(small.view(5, 5, 3)[:, 4], torch.zeros(5, 3))


def test_boxes_come_back_from_patches():
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4]]])
    found = from_patches(boxes, torch.tensor([[10, 20]]), 16, 15)
    assert found.tolist() == [[[10 * 16 + 120, 20 * 16 + 120, 48, pytest.approx(96)]]]


def test_neighbours_of_a_better_patch_go_but_not_in_other_images():
    centres = torch.tensor(
        [[100.0, 100], [100.0 + 8 * 16, 100], [100.0 + 10 * 16, 100], [101, 100]]
    )
    scores, images = torch.tensor([0.5, 0.4, 0.3, 0.6]), torch.tensor([0, 0, 0, 1])
    # Shifted by 8 of 15 cells: IoU 7/23 above 0.25; by 10: 5/25 below it.
    assert thinned(centres, scores, images, 240.0, 0.25).tolist() == [3, 0, 2]


def test_patches_of_other_images_never_suppress():
    """Whatever their place: half a patch may lie outside of an image."""
    torch.manual_seed(0)
    for _ in range(20):
        centres, images = torch.rand(60, 2) * 700, torch.randint(4, (60,))
        scores = torch.rand(60)
        together = set(thinned(centres, scores, images, 240.0, 0.05).tolist())
        alone = set()
        for image in range(4):
            own = (images == image).nonzero()[:, 0]
            zeros = torch.zeros_like(own)
            alone |= set(own[thinned(centres[own], scores[own], zeros, 240.0, 0.05)].tolist())
        assert together == alone


def test_padding_changes_no_query():
    torch.manual_seed(0)
    made = QueryInitializer(
        channels=16, num_classes=3, attention_heads=2, feedforward_channels=8, roi_positions=4
    ).eval()
    rois, boxes = torch.randn(1, 5, 4, 16), torch.rand(1, 5, 4) * 20
    boxes[..., 2:] += boxes[..., :2] + 4
    mask = torch.tensor([[True, True, True, False, False]])
    whole = made(rois.flatten(0, 1), boxes, attention_mask(mask))
    part = made(rois[:, :3].flatten(0, 1), boxes[:, :3])
    for a, b in zip(whole, part, strict=True):
        torch.testing.assert_close(a[:, :3], b)


@pytest.mark.parametrize("kind", ["adamixer", "sparse"])
def test_all_decoders_are_trained_and_the_used_one_is_inferences(kind):
    torch.manual_seed(0)
    sizes = {"channels": 16, "num_logits": 3, "attention_heads": 2, "feedforward_channels": 8}
    if kind == "adamixer":
        stage = AdaMixerStage(**sizes, groups=2, in_points=3, out_points=4)
    else:
        stage = RCNNHead(**sizes, dynamic_channels=4, roi_positions=4, num_cls=1, num_reg=1)
    rois = RoIFeatures(strides=(4, 8), resolution=2, aligned=False)
    decoders = ParallelDecoders(stage, channels=16, strides=(4, 8), rois=rois, count=3, used=1)
    pyramid = [torch.randn(2, 16, 16, 16), torch.randn(2, 16, 8, 8)]
    boxes = torch.tensor([8.0, 8, 40, 30]).expand(2, 5, 4).clone().requires_grad_()
    features = torch.randn(2, 5, 16, requires_grad=True)
    queries = InitialQueries(torch.zeros(2, 5, 3), boxes, features)
    found = decoders.train()(pyramid, rois.prepare(pyramid), queries)
    assert found.logits.shape == (3, 2, 5, 3)
    assert found.stage.tolist() == [0, 1, 2]  # decoders in their order
    torch.testing.assert_close(found.boxes, boxes.expand(3, -1, -1, -1), rtol=1e-4, atol=1e-3)
    (found.logits.sum() + found.boxes.sum()).backward()
    assert boxes.grad is None
    assert features.grad.abs().sum() > 0
    used = decoders.eval()(pyramid, rois.prepare(pyramid), queries)
    assert used.stage.tolist() == [1]
    torch.testing.assert_close(used.logits[0], found.logits[1])
