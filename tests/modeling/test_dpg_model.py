"""DPG in the detector: checkpoints, gradients, batches."""

import copy

import pytest
import torch
from conftest import batch, tiny_cfg
from detectron2.modeling import build_model
from dpg_scenes import DPG, SIZES, _same_start, dpg, pyramid, sizes  # noqa: F401  (a fixture)

from dsrcnn.modeling import DynamicSparseRCNN


def test_the_papers_name_is_the_same_model():
    name = ["MODEL.META_ARCHITECTURE", "DynamicSparseRCNN", "MODEL.SparseRCNN.DLA.ENABLED", True]
    model = build_model(dpg(*name))
    assert isinstance(model, DynamicSparseRCNN)
    assert model.state_dict().keys() == build_model(dpg()).state_dict().keys()
    assert len(model(batch(SIZES, [2, 0]))) == 6


def test_keys_are_those_of_a_static_model_but_for_the_proposals():
    static, dynamic = build_model(tiny_cfg()).state_dict(), build_model(dpg()).state_dict()
    own = {k for k in dynamic if k.startswith("proposal_generator.")}
    assert {"proposal_generator.expert_boxes", "proposal_generator.step"} <= own
    assert {"proposal_generator.fc2.weight", "proposal_generator.stair.2.conv.weight"} <= own
    proposals = {"init_proposal_boxes.weight", "init_proposal_features.weight"}
    assert set(dynamic) - own == set(static) - proposals


def test_a_static_checkpoint_becomes_every_expert_and_detects_the_same():
    static, dynamic = build_model(tiny_cfg()).eval(), build_model(dpg()).eval()
    report = dynamic.load_state_dict(static.state_dict(), strict=False)
    assert not report.unexpected_keys
    assert all(k.startswith("proposal_generator.") for k in report.missing_keys)
    assert not any("expert" in k for k in report.missing_keys)
    assert torch.equal(
        dynamic.proposals.expert_boxes[2], static.proposals.init_proposal_boxes.weight
    )
    inputs = batch(SIZES, [0, 0])
    with torch.no_grad():
        for a, b in zip(static.predict(inputs)[0], dynamic.predict(inputs)[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


def test_noise_tells_tiled_experts_apart():
    static, noisy = (
        build_model(tiny_cfg()),
        build_model(dpg("MODEL.SparseRCNN.DPG.TILING_NOISE", 0.1)),
    )
    noisy.load_state_dict(static.state_dict(), strict=False)
    again = build_model(dpg("MODEL.SparseRCNN.DPG.TILING_NOISE", 0.1))
    torch.manual_seed(7)  # another process has another seed, but needs the same experts
    again.load_state_dict(static.state_dict(), strict=False)
    assert torch.equal(again.proposals.expert_features, noisy.proposals.expert_features)
    deviation = noisy.proposals.expert_features - static.proposals.init_proposal_features.weight
    assert deviation.std().item() == pytest.approx(0.1, rel=0.1)
    assert torch.equal(noisy.proposals.expert_boxes[0], static.proposals.init_proposal_boxes.weight)


def test_a_static_checkpoint_with_another_number_of_proposals_is_not_tiled():
    static = build_model(tiny_cfg("MODEL.SparseRCNN.NUM_PROPOSALS", 5))
    report = build_model(dpg()).load_state_dict(static.state_dict(), strict=False)
    assert "init_proposal_boxes.weight" in report.unexpected_keys
    assert "proposal_generator.expert_boxes" in report.missing_keys


def test_one_expert_is_the_static_model_and_its_network_learns_nothing():
    model, static = build_model(dpg("MODEL.SparseRCNN.DPG.NUM_EXPERTS", 1)), build_model(tiny_cfg())
    model.load_state_dict(static.state_dict(), strict=False)
    inputs = batch(SIZES, [0, 0])
    with torch.no_grad():
        for a, b in zip(static.predict(inputs)[0], model.predict(inputs)[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
    sum(model(batch(SIZES, [2, 1])).values()).backward()
    for parameter in (model.proposals.fc1.weight, model.proposals.fc2.weight):
        assert parameter.grad.abs().max() == 0
    assert model.proposals.expert_features.grad.abs().max() > 0


def test_losses_reach_experts_and_network():
    model = build_model(dpg())
    sum(model(batch(SIZES, [2, 1])).values()).backward()
    for name, parameter in model.proposals.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def distance_from_alone(shapes, *, valid_region):
    """Total variation between the weights of the first image in a batch and alone."""
    options = ["MODEL.SparseRCNN.DPG.VALID_REGION", valid_region]
    options += ["MODEL.SparseRCNN.DPG.TAU_END", 1.0]
    torch.manual_seed(0)
    model = build_model(dpg(*options)).eval()
    model.proposals.fc2.weight.data.mul_(30)
    inputs = batch(shapes, [0, 0])
    with torch.no_grad():
        together, alone = (
            model.proposals.weights(*model.extract(x)[:2]) for x in (inputs, inputs[:1])
        )
    return (together[0] - alone[0]).abs().sum(dim=0).mean().item() / 2


@pytest.mark.parametrize("shapes", [[(64, 64), (128, 160)], [(192, 224), (192, 320)]])
def test_with_the_valid_region_neighbours_matter_through_the_border_of_the_backbone_only(shapes):
    whole = distance_from_alone(shapes, valid_region=False)
    assert whole > 0.1
    assert distance_from_alone(shapes, valid_region=True) < 0.2 * whole


@pytest.mark.parametrize("valid_region", [True, False])
def test_images_of_equal_padded_size_have_the_same_proposals_alone_and_in_a_batch(valid_region):
    assert distance_from_alone([(64, 90), (60, 96)], valid_region=valid_region) < 1e-5


def test_other_levels_have_their_strides():
    levels = ["MODEL.ROI_HEADS.IN_FEATURES", ["p3", "p4", "p5"]]
    model = build_model(dpg(*levels, "MODEL.SparseRCNN.DPG.VALID_REGION", True))
    assert model.proposals.strides == [8, 16, 32]
    assert all(torch.isfinite(v) for v in model(batch(SIZES, [2, 1])).values())


def test_boxes_stay_float32_under_autocast():
    model = build_model(dpg())
    with torch.autocast("cpu", torch.bfloat16):
        predictions, _, _ = model.predict(batch(SIZES, [2, 1]))
        proposals = model.proposals([x.bfloat16() for x in pyramid(channels=32)], sizes())
    assert predictions.boxes.dtype == proposals.boxes.dtype == torch.float32


def test_a_copied_model_is_the_same():
    model = build_model(dpg()).eval()
    inputs = batch(SIZES, [0, 0])
    with torch.no_grad():
        first, second = model(inputs), copy.deepcopy(model)(inputs)
    assert torch.equal(first[0]["instances"].scores, second[0]["instances"].scores)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_config_chooses_where_boxes_start(enabled):
    cfg = tiny_cfg(
        "MODEL.SparseRCNN.DPG.ENABLED", enabled, "MODEL.SparseRCNN.PROPOSALS.BOXES", "grid"
    )
    boxes = build_model(cfg).proposals(pyramid(channels=32), sizes()).boxes
    assert (boxes[0, :, 2] - boxes[0, :, 0]).max() < 96 / 2
