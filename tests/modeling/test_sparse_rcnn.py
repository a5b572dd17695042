import copy
import pickle

import pytest
import torch
from conftest import batch, tiny_cfg
from detectron2.modeling import build_model

from dsrcnn.config import read_cfg
from dsrcnn.modeling.decoder import DynamicHead, RCNNHead, RoIFeatures
from dsrcnn.modeling.postprocessing import select_detections
from dsrcnn.structures import Proposals

SIZES = [(64, 96), (96, 64)]
PRIOR_LOGIT = -4.59511985013459


def losses_of(model, inputs):
    losses = model(inputs)
    sum(losses.values()).backward()
    return {k: v.item() for k, v in losses.items()}


@pytest.mark.parametrize("depth", [50, 101])
def test_official_models_have_the_published_number_of_tensors_and_parameters(depth):
    cfg = read_cfg(f"coco/sparse_rcnn_R{depth}_300pro_3x", ["MODEL.DEVICE", "meta"])
    with torch.device("meta"):
        model = build_model(cfg)
    keys = model.state_dict()
    assert len(keys) == {50: 523, 101: 778}[depth]
    assert sum(p.numel() for p in model.head.parameters()) == 79_412_472
    if depth == 50:
        assert sum(p.numel() for p in model.parameters()) == 106_289_768
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 106_067_368
    assert keys["init_proposal_boxes.weight"].shape == (300, 4)
    assert keys["init_proposal_features.weight"].shape == (300, 256)


@pytest.mark.parametrize("classes", [1, 4, 32, 64, 80, 256])
def test_class_counts_that_equal_some_width_initialise_only_the_classifier(classes):
    model = build_model(tiny_cfg("MODEL.SparseRCNN.NUM_CLASSES", classes))
    for stage in model.head.head_series:
        assert torch.allclose(stage.class_logits.bias, torch.tensor(PRIOR_LOGIT))
        assert stage.bboxes_delta.bias.abs().max() <= 32**-0.5
        for name, parameter in stage.named_parameters():
            if "norm" in name and name.endswith("weight"):
                assert torch.equal(parameter, torch.ones_like(parameter)), name
            if name.endswith("bias") and name != "class_logits.bias":
                assert parameter.abs().max() < 1, name
    losses = model(batch(SIZES, [2, 3], classes=classes))
    assert all(torch.isfinite(v) for v in losses.values())


def test_proposals_start_as_the_whole_image():
    model = build_model(tiny_cfg())
    sizes = torch.tensor([[96.0, 64, 96, 64], [50, 40, 50, 40]])
    boxes, features = model.proposals([], sizes)
    assert torch.equal(boxes[0], torch.tensor([0.0, 0, 96, 64]).expand(8, 4))
    assert torch.equal(boxes[1], torch.tensor([0.0, 0, 50, 40]).expand(8, 4))
    assert features.shape == (2, 8, 32)


def test_stages_have_equal_biases_and_different_matrices_at_first():
    first, second = build_model(tiny_cfg()).head.head_series
    assert torch.equal(first.linear1.bias, second.linear1.bias)
    assert not torch.equal(first.linear1.weight, second.linear1.weight)


def test_more_ground_truths_than_proposals_train():
    model = build_model(tiny_cfg())
    losses = losses_of(model, batch(SIZES, [120, 3]))
    assert all(torch.isfinite(torch.tensor(list(losses.values()))))
    assert losses["loss_bbox"] > 0


@pytest.mark.parametrize("counts", [[0, 3], [0, 0]])
def test_images_without_boxes_train_every_parameter(counts):
    model = build_model(tiny_cfg("MODEL.BACKBONE.FREEZE_AT", 0))
    losses_of(model, batch(SIZES, counts))
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


def test_images_of_one_batch_do_not_influence_each_other():
    # All three are padded to 96 x 96, alone as in the batch.
    inputs = batch([(96, 70), (65, 96), (96, 96)], [1, 1, 1])
    model = build_model(tiny_cfg()).eval()
    with torch.no_grad():
        together = model(inputs)
        alone = [model([x])[0] for x in inputs]
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(
            a["instances"].pred_boxes.tensor, b["instances"].pred_boxes.tensor, atol=1e-3, rtol=1e-4
        )
        torch.testing.assert_close(a["instances"].scores, b["instances"].scores)


def test_permuting_proposals_permutes_every_stage():
    model = build_model(tiny_cfg())
    order = torch.randperm(8)
    features = [torch.randn(2, 32, 64 // s, 64 // s) for s in (4, 8, 16, 32)]
    corner = torch.rand(2, 8, 2) * 30
    boxes = torch.cat([corner, corner + 20], dim=-1)
    states = torch.randn(2, 8, 32)
    plain = model.head(features, Proposals(boxes, states))
    permuted = model.head(features, Proposals(boxes[:, order], states[:, order]))
    torch.testing.assert_close(permuted.logits, plain.logits[:, :, order], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(permuted.boxes, plain.boxes[:, :, order], atol=1e-3, rtol=1e-4)


def test_groups_are_independent_cascade_inputs_of_one_stage():
    stage = RCNNHead(tiny_cfg())
    pooled = torch.randn(2, 3, 8, 49, 32)
    boxes = torch.tensor([0.0, 0, 30, 30]).expand(2, 3, 8, 4)
    states = torch.randn(2, 3, 8, 32)
    together = stage(pooled.flatten(0, 2), boxes, states)
    for g in range(3):
        one = slice(g, g + 1)
        alone = stage(pooled[:, one].flatten(0, 2), boxes[:, one], states[:, one])
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[:, one], b, atol=1e-5, rtol=1e-4)


def test_a_box_loss_trains_its_own_stage_and_the_features_before():
    model = build_model(tiny_cfg())
    losses = model(batch(SIZES, [2, 3]))
    losses["loss_bbox"].backward()  # of the second and last stage
    first, second = model.head.head_series
    assert second.bboxes_delta.weight.grad.abs().sum() > 0
    assert first.linear1.weight.grad.abs().sum() > 0  # through the features
    assert first.bboxes_delta.weight.grad.abs().sum() == 0  # boxes are detached between stages
    assert model.proposals.init_proposal_boxes.weight.grad.abs().sum() == 0


def test_initial_boxes_learn_from_the_first_stage_only():
    model = build_model(tiny_cfg())
    losses = model(batch(SIZES, [2, 3]))
    losses["loss_bbox_0"].backward()
    assert model.proposals.init_proposal_boxes.weight.grad.abs().sum() > 0


def test_deep_supervision_changes_the_losses_but_not_the_last_stage():
    inputs = batch(SIZES, [2, 3])
    model = build_model(tiny_cfg())
    single = build_model(tiny_cfg("MODEL.SparseRCNN.DEEP_SUPERVISION", False))
    single.load_state_dict(model.state_dict())
    deep, last = model(inputs), single(inputs)
    assert set(last) == {"loss_ce", "loss_bbox", "loss_giou"}
    assert len(deep) == 6
    for name, value in last.items():
        torch.testing.assert_close(deep[name], value)


def test_softmax_classification_trains_and_detects():
    model = build_model(tiny_cfg("MODEL.SparseRCNN.USE_FOCAL", False))
    assert "criterion.empty_weight" in model.state_dict()
    losses_of(model, batch(SIZES, [2, 0]))
    with torch.no_grad():
        found = model.eval()(batch(SIZES, [0, 0]))[0]["instances"]
    assert found.pred_classes.max() < 5
    assert ((found.scores > 0) & (found.scores < 1)).all()


@pytest.mark.parametrize(("limit", "expected"), [(3, 3), (8, 8), (100, 8)])
@pytest.mark.parametrize("focal", [True, False])
def test_detections_are_limited_by_the_config_and_by_the_proposals(limit, expected, focal):
    scores, classes, boxes, _ = select_detections(
        torch.randn(2, 8, 5), torch.rand(2, 8, 4), limit=limit, focal=focal
    )
    assert scores.shape == classes.shape == boxes.shape[:2] == (2, expected)
    assert torch.equal(scores, scores.sort(dim=1, descending=True).values)


def test_the_config_limits_the_detections_of_the_model():
    model = build_model(tiny_cfg("TEST.DETECTIONS_PER_IMAGE", 3)).eval()
    with torch.no_grad():
        assert len(model(batch([(96, 96)], [0]))[0]["instances"]) <= 3


def test_a_proposal_may_be_detected_with_two_classes():
    # p = 0.9 and 0.8 on the first proposal, 0.7 on the second
    odds = torch.tensor([[[9.0, 4.0], [7 / 3, 0.1]]])
    boxes = torch.tensor([[[0.0, 0, 1, 1], [0, 0, 2, 2]]])
    scores, classes, found, _ = select_detections(odds.log(), boxes, limit=100, focal=True)
    assert scores[0].tolist() == pytest.approx([0.9, 0.8])
    assert classes[0].tolist() == [0, 1]
    assert found[0, :, 2].tolist() == [1.0, 1.0]


def test_detections_are_scaled_to_the_original_image_and_clipped():
    inputs = batch([(64, 96)], [0])
    inputs[0] |= {"height": 128, "width": 192}
    model = build_model(tiny_cfg()).eval()
    with torch.no_grad():
        large = model(inputs)[0]["instances"]
        small = model(batch([(64, 96)], [0]))[0]["instances"]
    assert large.image_size == (128, 192)
    torch.testing.assert_close(large.pred_boxes.tensor, small.pred_boxes.tensor * 2)
    assert (large.pred_boxes.tensor >= 0).all()
    assert (large.pred_boxes.tensor <= torch.tensor([192, 128, 192, 128])).all()


def test_inputs_follow_the_model_to_another_device_after_construction():
    model = build_model(tiny_cfg())
    model.to("meta")
    assert model.device.type == "meta"
    model = build_model(tiny_cfg()).double()  # a move of dtype is the one testable without a GPU
    assert model.pixel_mean.dtype == torch.float64


def test_the_model_can_be_pickled_and_copied():
    model = build_model(tiny_cfg()).eval()
    inputs = batch([(64, 64)], [0])
    with torch.no_grad():
        expected = model(inputs)[0]["instances"].scores
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(inputs)[0]["instances"].scores, expected)


def test_saving_and_loading_keep_the_official_keys_under_any_prefix():
    model = build_model(tiny_cfg())
    state = model.state_dict()
    assert "init_proposal_boxes.weight" in state
    assert not any(k.startswith("proposals.") for k in state)
    wrapper = torch.nn.ModuleDict({"module": model})
    assert "module.init_proposal_boxes.weight" in wrapper.state_dict()
    other = torch.nn.ModuleDict({"module": build_model(tiny_cfg())})
    assert not other.load_state_dict(wrapper.state_dict()).missing_keys


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_half_precision_is_finite_and_keeps_boxes_in_float32(dtype):
    model = build_model(tiny_cfg())
    inputs = batch(SIZES, [2, 3])
    with torch.autocast("cpu", dtype):
        predictions, _, _ = model.predict(inputs)
        losses = model(inputs)
    assert predictions.boxes.dtype == torch.float32
    assert all(torch.isfinite(v) and v.dtype == torch.float32 for v in losses.values())
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_parts_can_be_built_without_a_config():
    stage = RCNNHead(
        channels=16, num_logits=3, attention_heads=2, feedforward_channels=32,
        dynamic_channels=4, roi_positions=9, num_cls=1, num_reg=1,
    )  # fmt: skip
    head = DynamicHead(
        stage=stage, num_stages=2, roi_features=RoIFeatures(strides=(8, 16), resolution=3)
    )
    features = [torch.randn(1, 16, 8, 8), torch.randn(1, 16, 4, 4)]
    predictions = head(features, Proposals(torch.rand(1, 5, 4) * 60, torch.randn(1, 5, 16)))
    assert predictions.logits.shape == (2, 1, 5, 3)
    assert predictions.stage.tolist() == [0, 1]


def test_boxes_are_compared_by_another_overlap_for_loss_and_cost_separately():
    node = "MODEL.SparseRCNN.OVERLAP"
    model = build_model(tiny_cfg(f"{node}.LOSS", "ciou", f"{node}.COST", "diou"))
    assert model.criterion.overlap == "ciou"
    assert model.matcher.costs.overlap == "diou"
    losses = model(batch([(64, 96)], [3]))
    assert set(losses) == {f"loss_{n}{s}" for n in ("ce", "bbox", "ciou") for s in ("", "_0")}
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_batches_are_padded_to_the_least_side_and_results_stay():
    inputs = batch([(64, 96), (96, 64)], [2, 1])
    model = build_model(tiny_cfg("INPUT.PAD_TO", 128)).eval()
    sizes = []
    model.backbone.register_forward_hook(lambda _, args, __: sizes.append(args[0].shape[-2:]))
    found = model(inputs)
    assert sizes == [(128, 128)]
    assert [tuple(x["instances"].image_size) for x in found] == [(64, 96), (96, 64)]
    single, both = (x[0]["instances"].pred_boxes.tensor for x in (model(inputs[:1]), found))
    torch.testing.assert_close(single, both, rtol=1e-3, atol=1e-2)
