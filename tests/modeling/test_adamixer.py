"""AdaMixer as a stage and as a detector."""

import pytest
import torch
from conftest import batch
from detectron2.modeling import build_model

from dsrcnn.config import check_config, read_cfg
from dsrcnn.errors import ConfigError
from dsrcnn.layers.point_sampling import GroupedPyramid
from dsrcnn.modeling.decoder import AdaMixerStage
from dsrcnn.modeling.decoder.sqr import plain_sets

SIZES = [(64, 96), (96, 64)]
KEY = "MODEL.SparseRCNN."


def cfg_of(*opts):
    small = ["MODEL.DEVICE", "cpu", f"{KEY}NUM_CLASSES", 5, f"{KEY}NUM_PROPOSALS", 8]
    return read_cfg("quick/adamixer_shapes", [*small, *opts])


def model_of(*opts):
    torch.manual_seed(0)
    return build_model(cfg_of(*opts))


def stage(**options):
    torch.manual_seed(0)
    made = AdaMixerStage(
        channels=16, num_logits=3, attention_heads=2, feedforward_channels=32, groups=2,
        in_points=4, out_points=6, **options,
    ).double()  # fmt: skip
    made.initialize(0.01)
    return made.eval()


def pyramid(images=1, size=96, shift=0):
    """Levels of a pattern that moves by `shift` pixels of the input, a multiple of 32."""
    generator = torch.Generator().manual_seed(1)
    levels = []
    for stride in (4, 8, 16, 32):
        side = size // stride
        level = torch.randn(images, 16, side, side, generator=generator, dtype=torch.float64)
        levels.append(level.roll(shift // stride, dims=-1))
    return GroupedPyramid.from_levels(levels, (4, 8, 16, 32), 2)


def proposals(images=1, groups=1, count=5):
    generator = torch.Generator().manual_seed(2)
    draw = lambda *s: torch.rand(*s, generator=generator, dtype=torch.float64)  # noqa: E731
    corner = 20 + draw(images, groups, count, 2) * 20
    boxes = torch.cat([corner, corner + 5 + draw(images, groups, count, 2) * 10], dim=-1)
    return boxes, draw(images, groups, count, 16)


def test_an_untrained_stage_leaves_boxes_and_starts_at_the_prior():
    made, (boxes, features) = stage(), proposals()
    logits, refined, new = made(pyramid(), boxes, features)
    torch.testing.assert_close(refined, boxes, rtol=1e-4, atol=1e-3)
    assert logits.shape == (1, 1, 5, 3)
    assert new.shape == features.shape
    assert made.fc_cls.bias.tolist() == pytest.approx([-4.59512] * 3, abs=1e-4)
    offsets = made.sampling_offset_generator.bias.view(-1, 3)
    assert (offsets[:, 2] == -1).all()
    assert offsets[:, :2].abs().max() <= 0.5


def test_a_square_number_of_points_starts_on_a_grid():
    """Four points: the middles of the quarters of the box. Others, and ASAG's, are scattered."""
    bias = stage().sampling_offset_generator.bias.view(2, 4, 3)[..., :2]
    assert bias[0].tolist() == [[-0.25, -0.25], [-0.25, 0.25], [0.25, -0.25], [0.25, 0.25]]
    assert torch.equal(bias[0], bias[1])
    scattered = stage(grid=False).sampling_offset_generator.bias.view(2, 4, 3)[..., :2]
    assert not torch.equal(scattered[0], scattered[1])


def test_stages_start_with_mixings_of_their_own():
    first, second = (x.adaptive_mixing.parameter_generator for x in model_of().head.head_series[:2])
    assert not first.weight.any()
    assert not torch.equal(first.bias, second.bias)
    assert first.bias.abs().max() <= first.in_features**-0.5


def test_deltas_are_in_scales_of_the_box():
    made, (boxes, features) = stage(), proposals()
    made.fc_reg.bias.data = torch.tensor([0.5, 0.0, 1.0, 0.0]).double()
    _, refined, _ = made(pyramid(), boxes, features)
    size, new = boxes[..., 2:] - boxes[..., :2], refined[..., 2:] - refined[..., :2]
    torch.testing.assert_close(new, 2 * size, rtol=1e-4, atol=1e-3)  # z + 1: twice the scale
    moved = (refined[..., :2] + refined[..., 2:] - boxes[..., :2] - boxes[..., 2:]) / 2
    scale = size.prod(dim=-1).sqrt()
    expected = torch.stack([0.5 * scale, torch.zeros_like(scale)], dim=-1)
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("unit", [1.0, 4.0])
def test_points_lie_within_the_box_one_level_finer_at_the_start(unit):
    made, (boxes, features) = stage(unit=unit), proposals()
    from dsrcnn.structures import boxes_to_xyzr

    xyzr = boxes_to_xyzr(boxes, unit=unit)
    points = made.points(xyzr, made.sampling_offset_generator(features))
    low, high = (x[..., None, None, :] for x in boxes.split(2, dim=-1))
    assert (points[..., :2] >= low - 0.01).all()
    assert (points[..., :2] <= high + 0.01).all()
    size = (boxes[..., 2:] - boxes[..., :2]).prod(dim=-1)
    expected = (0.5 * torch.log2(size) - 1)[..., None, None].expand(points.shape[:-1])
    torch.testing.assert_close(points[..., 2], expected, rtol=1e-4, atol=1e-4)


def test_a_published_point():
    """In units of 4 pixels: (101.414215, 44.343147), scale 2, where level 0 is of stride 4."""
    made = stage(unit=4.0, ratio_scale=0.5)
    offsets = torch.tensor([0.25, -0.5, -1.0]).double().repeat(8)
    point = made.points(torch.tensor([100, 50, 3, 0.5]).double(), offsets)[0, 0].tolist()
    assert point == pytest.approx([4 * 101.414215, 4 * 44.343147, 2.0 + 2], abs=1e-4)


def test_groups_and_images_do_not_see_each_other():
    made, (boxes, features) = stage(), proposals(images=2, groups=3)
    before = made(pyramid(2), boxes, features)
    changed = features.clone()
    changed[1, 2] += 1.0
    after = made(pyramid(2), boxes, changed)
    same = [(a == b).flatten(2).all(dim=2).tolist() for a, b in zip(before, after, strict=True)]
    assert same[0] == same[2] == [[True] * 3, [True, True, False]]


def test_groups_at_once_are_groups_one_by_one():
    made, (boxes, features) = stage(), proposals(images=2, groups=3)
    whole = made(pyramid(2), boxes, features)
    for group in range(3):
        part = made(pyramid(2), boxes[:, group, None], features[:, group, None])
        for a, b in zip(whole, part, strict=True):
            torch.testing.assert_close(a[:, group, None], b)


def test_a_moved_image_moves_what_is_sampled():
    made, (boxes, features) = stage(), proposals()
    from dsrcnn.layers.point_sampling import sample_points
    from dsrcnn.structures import boxes_to_xyzr

    offsets = made.sampling_offset_generator(features)
    moved = boxes + torch.tensor([32.0, 0, 32, 0])
    first = sample_points(pyramid(), made.points(boxes_to_xyzr(boxes), offsets).flatten(1, 2))
    points = made.points(boxes_to_xyzr(moved), offsets).flatten(1, 2)
    second = sample_points(pyramid(shift=32), points)
    # The coarsest level is cut at its border, so far away from 20..55 that it does not matter.
    torch.testing.assert_close(first, second, rtol=0.2, atol=0.2)


@pytest.mark.parametrize(
    "opts",
    [
        [],
        [f"{KEY}DLA.ENABLED", True],
        [f"{KEY}DPG.ENABLED", True],
        [f"{KEY}SQR.ENABLED", True],
        [f"{KEY}SQR.ENABLED", True, f"{KEY}SQR.CHUNK", 1, f"{KEY}SQR.CHECKPOINT", True],
        ["MODEL.CHECKPOINT.STAGES", True],
        [f"{KEY}ACTIVATION", "gelu", f"{KEY}USE_FOCAL", False],
    ],
)
def test_it_trains_with(opts):
    model = model_of(*opts).train()
    for counts in ([3, 2], [0, 1]):
        losses = model(batch(SIZES, counts))
        assert len(losses) == 9
        assert all(torch.isfinite(v) for v in losses.values())
        model.zero_grad()
        sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    found = model.eval()(batch(SIZES, [0, 0]))
    assert all(len(x["instances"]) for x in found)


def test_queries_are_standardized_and_start_as_the_whole_image():
    model = model_of()
    boxes, features = model.proposals([], torch.tensor([[96.0, 64, 96, 64]]))
    assert boxes.shape == (1, 8, 4)
    assert (boxes == torch.tensor([0.0, 0, 96, 64])).all()
    assert features.mean(dim=-1).abs().max() < 1e-5
    torch.testing.assert_close(
        features.var(dim=-1, unbiased=False), torch.ones(1, 8), atol=1e-3, rtol=0
    )
    names = [name for name, _ in model.named_parameters() if "proposal" in name]
    assert names == ["proposals.init_proposal_features.weight"]
    assert "init_proposal_features.weight" in model.state_dict()


def test_recollection_has_the_plain_cascade_last():
    plain, model = model_of().double().train(), model_of(f"{KEY}SQR.ENABLED", True).double().train()
    inputs = batch(SIZES, [3, 2])
    expected, found = plain.predict(inputs)[0], model.predict(inputs)[0]
    sets = plain_sets(found)
    assert len(found.stage) == 6
    for a, b in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(a[sets], b, rtol=0, atol=1e-9)


def test_it_runs_in_bfloat16():
    model = model_of().train()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(batch(SIZES, [3, 2]))
    assert all(torch.isfinite(v) for v in losses.values())
    sum(losses.values()).backward()


@pytest.mark.parametrize(
    ("opts", "words"),
    [
        (["MODEL.AdaMixer.GROUPS", 3], "a multiple of 8 and of MODEL.AdaMixer.GROUPS 3"),
        (["MODEL.AdaMixer.IN_POINTS", 0], "IN_POINTS is 0"),
    ],
)
def test_values_that_cannot_work_are_refused(opts, words):
    with pytest.raises(ConfigError, match=words):
        check_config(cfg_of(*opts))
