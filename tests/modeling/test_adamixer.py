"""AdaMixer as a stage and as a detector."""

import pytest
import torch
from conftest import batch
from detectors import DLA, SETTINGS, SIZES, SQR, enable, options, train_step
from detectron2.modeling import build_model

from dsrcnn.config import check_config, read_cfg
from dsrcnn.errors import ConfigError
from dsrcnn.layers.point_sampling import GroupedPyramid
from dsrcnn.modeling.decoder import AdaMixerStage
from dsrcnn.structures import boxes_to_xyzr

CLOSE = {"rtol": 1e-4, "atol": 1e-3}


def cfg_of(*opts):
    small = ["MODEL.DEVICE", "cpu", *options("NUM_CLASSES", 5, "NUM_PROPOSALS", 8)]
    return read_cfg("quick/adamixer_shapes", [*small, *opts])


def model_of(*opts):
    torch.manual_seed(0)
    return build_model(cfg_of(*opts)).train()


def make_stage(**options):
    torch.manual_seed(0)
    stage = AdaMixerStage(settings=SETTINGS, groups=2, in_points=4, out_points=6, **options)
    stage.double().initialize(0.01)
    return stage.eval()


def pyramid(images=slice(0, 1)):
    """Random levels of two images of 96 x 96 pixels."""
    generator, sides = torch.Generator().manual_seed(1), (24, 12, 6, 3)
    levels = [torch.randn(2, 16, n, n, generator=generator, dtype=torch.float64) for n in sides]
    return GroupedPyramid.from_levels([x[images] for x in levels], (4, 8, 16, 32), 2)


def proposals(images=1, groups=1, count=5):
    generator = torch.Generator().manual_seed(2)
    draw = lambda *s: torch.rand(*s, generator=generator, dtype=torch.float64)  # noqa: E731
    corner = 20 + draw(images, groups, count, 2) * 20
    boxes = torch.cat([corner, corner + 5 + draw(images, groups, count, 2) * 10], dim=-1)
    return boxes, draw(images, groups, count, 16)


def test_an_untrained_stage_keeps_boxes_and_starts_at_the_prior():
    stage, (boxes, features) = make_stage(), proposals()
    logits, refined, new = stage(pyramid(), boxes, features)
    torch.testing.assert_close(refined, boxes, **CLOSE)
    assert logits.shape == (1, 1, 5, 3)
    assert new.shape == features.shape
    assert stage.fc_cls.bias.tolist() == pytest.approx([-4.59512] * 3, abs=1e-4)


def test_a_square_number_of_points_starts_on_a_grid_and_others_at_random():
    """Four points: the centers of the quarters of the box. ASAG's start at random."""
    grid, scattered = (
        make_stage(grid=x).sampling_offset_generator.bias.view(2, 4, 3) for x in (True, False)
    )
    assert grid[0, :, :2].tolist() == [[-0.25, -0.25], [-0.25, 0.25], [0.25, -0.25], [0.25, 0.25]]
    assert torch.equal(grid[0], grid[1])
    assert not torch.equal(scattered[0], scattered[1])
    assert scattered[..., :2].abs().max() <= 0.5
    assert (scattered[..., 2] == -1).all()


def test_stages_start_with_different_mixing_biases_and_have_towers_of_one_layer():
    stages = model_of(*options("NUM_CLS", 2, "NUM_REG", 3)).head.head_series[:2]
    first, second = (x.adaptive_mixing.parameter_generator for x in stages)
    assert not first.weight.any()
    assert not torch.equal(first.bias, second.bias)
    assert first.bias.abs().max() <= first.in_features**-0.5
    for tower in (stages[0].cls_fcs, stages[0].reg_fcs):
        assert sum(isinstance(m, torch.nn.Linear) for m in tower.modules()) == 1


def test_deltas_are_in_scales_of_the_box():
    stage, (boxes, features) = make_stage(), proposals()
    stage.fc_reg.bias.data = torch.tensor([0.5, 0.0, 1.0, 0.0]).double()
    _, refined, _ = stage(pyramid(), boxes, features)
    size, new = boxes[..., 2:] - boxes[..., :2], refined[..., 2:] - refined[..., :2]
    torch.testing.assert_close(new, 2 * size, **CLOSE)  # z + 1: twice the scale
    moved = (refined[..., :2] + refined[..., 2:] - boxes[..., :2] - boxes[..., 2:]) / 2
    scale = size.prod(dim=-1).sqrt()
    expected = torch.stack([0.5 * scale, torch.zeros_like(scale)], dim=-1)
    torch.testing.assert_close(moved, expected, **CLOSE)


@pytest.mark.parametrize("unit", [1.0, 4.0])
def test_points_start_within_the_box_one_level_finer(unit):
    stage, (boxes, features) = make_stage(unit=unit), proposals()
    xyzr = boxes_to_xyzr(boxes, unit=unit)
    points = stage.points(xyzr, stage.sampling_offset_generator(features))
    low, high = (x[..., None, None, :] for x in boxes.split(2, dim=-1))
    assert (points[..., :2] >= low - 0.01).all()
    assert (points[..., :2] <= high + 0.01).all()
    size = (boxes[..., 2:] - boxes[..., :2]).prod(dim=-1)
    expected = (0.5 * torch.log2(size) - 1)[..., None, None].expand(points.shape[:-1])
    torch.testing.assert_close(points[..., 2], expected, rtol=1e-4, atol=1e-4)


def test_a_sampling_point_agrees_with_published_numbers():
    """In units of 4 pixels: (101.414215, 44.343147), scale 2, where level 0 is of stride 4."""
    stage = make_stage(unit=4.0, ratio_scale=0.5)
    offsets = torch.tensor([0.25, -0.5, -1.0]).double().repeat(8)
    point = stage.points(torch.tensor([100, 50, 3, 0.5]).double(), offsets)[0, 0].tolist()
    assert point == pytest.approx([4 * 101.414215, 4 * 44.343147, 2.0 + 2], abs=1e-4)


def test_groups_and_images_at_once_agree_with_one_by_one():
    stage, (boxes, features) = make_stage(), proposals(images=2, groups=3)
    outputs = stage(pyramid(slice(0, 2)), boxes, features)
    for image in (slice(0, 1), slice(1, 2)):
        for group in range(3):
            inputs = (x[image, group].unsqueeze(1) for x in (boxes, features))
            for a, b in zip(outputs, stage(pyramid(image), *inputs), strict=True):
                torch.testing.assert_close(a[image, group].unsqueeze(1), b)


@pytest.mark.parametrize("opts", [
    [], DLA, enable("DPG"), options("PROPOSALS.NAME", "LearnedProposals"), SQR,
    enable("SQR", "CHUNK", 1, "ACTIVATION_CHECKPOINT", True),
    ["MODEL.ACTIVATION_CHECKPOINT", ("stages",)], options("ACTIVATION", "gelu", "USE_FOCAL", False),
])  # fmt: skip
def test_it_trains_and_detects_with(opts):
    model = model_of(*opts)
    for counts, half in (([3, 2], False), ([0, 1], False), ([3, 2], True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            assert len(train_step(model, batch(SIZES, counts))) == 9
    assert all(len(x["instances"]) for x in model.eval()(batch(SIZES, [0, 0])))


def test_queries_are_standardized_and_start_as_the_whole_image():
    model = model_of()
    boxes, features = model.proposals([], torch.tensor([[96.0, 64, 96, 64]]))
    assert boxes.shape == (1, 8, 4)
    assert (boxes == torch.tensor([0.0, 0, 96, 64])).all()
    assert features.mean(dim=-1).abs().max() < 1e-5
    variance = features.var(dim=-1, unbiased=False)
    torch.testing.assert_close(variance, torch.ones(1, 8), atol=1e-3, rtol=0)
    names = [name for name, _ in model.named_parameters() if "proposal" in name]
    assert names == ["proposals.init_proposal_features.weight"]
    assert "init_proposal_features.weight" in model.state_dict()


def test_with_recollection_the_last_group_of_every_stage_is_the_plain_cascade():
    inputs = batch(SIZES, [3, 2])
    expected, predictions = (
        model_of(*opts).double().raw_predictions(inputs)[0] for opts in ([], SQR)
    )
    assert predictions.stage.tolist() == [0, 1, 1, 2, 2, 2]
    for a, b in zip(predictions[:2], expected[:2], strict=True):
        torch.testing.assert_close(a[[0, 2, 5]], b, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("opts", "words"), [
    ([*options("HIDDEN_DIM", 36, "NHEADS", 4), "MODEL.FPN.OUT_CHANNELS", 36],
     "HIDDEN_DIM is 36; AdaMixer needs a multiple of 8"),
    (["MODEL.AdaMixer.IN_POINTS", 0], "IN_POINTS is 0"),
    (options("DROPOUT", 0.1), "DROPOUT is 0.1, which has no effect in AdaMixer"),
    (options("PROPOSALS.BOXES", "grid"), "BOXES is 'grid', which has no effect"),
    (options("BOX_WEIGHTS", (10.0, 10.0, 5.0, 5.0)), "BOX_WEIGHTS is .* no effect in AdaMixer"),
])  # fmt: skip
def test_values_that_cannot_work_are_refused(opts, words):
    with pytest.raises(ConfigError, match=words):
        check_config(cfg_of(*opts))
