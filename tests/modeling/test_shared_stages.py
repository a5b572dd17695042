"""One stage that serves as all stages of a cascade."""

import pytest
import torch
from conftest import batch, tiny_cfg
from detectors import DLA, DPG, SIZES, SQR, model_of, options, train_step
from detectron2.modeling import build_model

from dsrcnn.config import read_cfg

SHARED = options("SHARE_STAGES", True, "NUM_HEADS", 3)


def test_a_shared_cascade_equals_three_stages_with_the_same_weights():
    shared = model_of(*SHARED)
    plain = model_of(*options("NUM_HEADS", 3))
    for stage in plain.head.head_series:
        stage.load_state_dict(shared.head.head_series[0].state_dict())
    rest = {k: v for k, v in shared.state_dict().items() if not k.startswith("head.")}
    plain.load_state_dict(rest, strict=False)
    inputs = batch(SIZES, [2, 3])
    for name, loss in shared(inputs).items():
        torch.testing.assert_close(loss, plain(inputs)[name])


def test_the_embedding_of_a_stage_changes_that_stage_and_later_ones_only():
    model = model_of(*SHARED)
    before = model(batch(SIZES, [2, 3]))
    with torch.no_grad():
        model.head.stage_embedding.weight[1] += torch.randn(32)
    after = model(batch(SIZES, [2, 3]))
    assert torch.equal(before["loss_ce_0"], after["loss_ce_0"])
    assert not torch.isclose(before["loss_ce_1"], after["loss_ce_1"])
    assert not torch.isclose(before["loss_ce"], after["loss_ce"])


@pytest.mark.parametrize("opts", [[], DLA, DPG, SQR])
def test_every_parameter_is_trained(opts):
    train_step(model_of(*SHARED, *opts), batch(SIZES, [2, 3]))


def test_adamixer_shares_stages_too():
    small = ["MODEL.DEVICE", "cpu", *options("NUM_CLASSES", 5)]
    model = build_model(read_cfg("quick/adamixer_shapes", [*small, *SHARED]))
    train_step(model, batch(SIZES, [2, 3]))


def test_the_head_of_a_published_size_is_a_sixth():
    cfg = read_cfg("coco/sparse_rcnn_R50_300pro_3x", ["MODEL.DEVICE", "meta", *SHARED[:2]])
    with torch.device("meta"):
        model = build_model(cfg)
    assert sum(p.numel() for p in model.head.parameters()) == 79_412_472 // 6 + 6 * 256


def test_a_single_stage_needs_no_embedding():
    model = build_model(tiny_cfg(*options("SHARE_STAGES", True, "NUM_HEADS", 1)))
    assert not hasattr(model.head, "stage_embedding")
