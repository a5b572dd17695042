import copy
import pickle
from unittest import mock

import pytest
import torch
from conftest import batch, tiny_cfg
from detectors import DLA, DPG, SETTINGS, SIZES, model_of, options, train_step
from detectron2.modeling import build_model

from dsrcnn.config import read_cfg
from dsrcnn.errors import ConfigError
from dsrcnn.modeling.decoder import DynamicHead, RCNNHead, RoIFeatures
from dsrcnn.modeling.freeze import freeze_modules
from dsrcnn.structures import Proposals

INPUTS = batch(SIZES, [2, 3])
PRIOR_LOGIT = -4.59511985013459


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
def test_only_the_classifier_starts_at_the_prior_also_where_widths_equal_the_class_count(classes):
    model = model_of(*options("NUM_CLASSES", classes))
    for stage in model.head.head_series:
        assert torch.allclose(stage.class_logits.bias, torch.tensor(PRIOR_LOGIT))
        assert stage.bboxes_delta.bias.abs().max() <= 32**-0.5
        for name, parameter in stage.named_parameters():
            if "norm" in name and name.endswith("weight"):
                assert torch.equal(parameter, torch.ones_like(parameter)), name
            if name.endswith("bias") and name != "class_logits.bias":
                assert parameter.abs().max() < 1, name
    train_step(model, batch(SIZES, [2, 3], classes=classes))


def test_proposals_start_as_the_whole_image():
    sizes = torch.tensor([[96.0, 64, 96, 64], [50, 40, 50, 40]])
    boxes, features = model_of().proposals([], sizes)
    assert torch.equal(boxes[0], torch.tensor([0.0, 0, 96, 64]).expand(8, 4))
    assert torch.equal(boxes[1], torch.tensor([0.0, 0, 50, 40]).expand(8, 4))
    assert features.shape == (2, 8, 32)


def test_stages_start_with_equal_biases_and_different_matrices():
    first, second = model_of().head.head_series
    assert torch.equal(first.linear1.bias, second.linear1.bias)
    assert not torch.equal(first.linear1.weight, second.linear1.weight)


@pytest.mark.parametrize("counts", [[0, 3], [0, 0], [120, 3]])
def test_images_without_objects_and_crowds_train_every_parameter(counts):
    model = model_of("MODEL.BACKBONE.FREEZE_AT", 0)  # 8 proposals
    losses = train_step(model, batch(SIZES, counts))
    assert (losses["loss_bbox"] > 0) == (sum(counts) > 0)


def test_images_of_a_batch_do_not_affect_each_other():
    # All three are padded to 96 x 96, alone as in the batch.
    inputs = batch([(96, 70), (65, 96), (96, 96)], [1, 1, 1])
    model = model_of().eval()
    with torch.no_grad():
        together, alone = model(inputs), [model([x])[0] for x in inputs]
    for a, b in zip(together, alone, strict=True):
        a, b = a["instances"], b["instances"]
        torch.testing.assert_close(a.pred_boxes.tensor, b.pred_boxes.tensor, atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(a.scores, b.scores)


def test_permuting_proposals_permutes_every_stage():
    model = model_of()
    order = torch.randperm(8)
    features = [torch.randn(2, 32, 64 // s, 64 // s) for s in (4, 8, 16, 32)]
    corner = torch.rand(2, 8, 2) * 30
    boxes, states = torch.cat([corner, corner + 20], dim=-1), torch.randn(2, 8, 32)
    plain = model.head(features, Proposals(boxes, states))
    permuted = model.head(features, Proposals(boxes[:, order], states[:, order]))
    torch.testing.assert_close(permuted.logits, plain.logits[:, :, order], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(permuted.boxes, plain.boxes[:, :, order], atol=1e-3, rtol=1e-4)


def test_groups_and_images_at_once_agree_with_one_by_one():
    stage = RCNNHead(tiny_cfg())
    pooled = torch.randn(2, 3, 8, 49, 32)
    boxes = torch.tensor([0.0, 0, 30, 30]).expand(2, 3, 8, 4)
    states = torch.randn(2, 3, 8, 32)
    outputs = stage(pooled.flatten(0, 2), boxes, states)
    for b, g in ((b, g) for b in range(2) for g in range(3)):
        index = slice(b, b + 1), slice(g, g + 1)
        alone = stage(pooled[index].flatten(0, 2), boxes[index], states[index])
        for x, y in zip(outputs, alone, strict=True):
            torch.testing.assert_close(x[index], y, atol=1e-5, rtol=1e-4)


def test_a_box_loss_trains_the_boxes_of_its_stage_and_the_features_before():
    model = model_of()
    losses = model(INPUTS)
    losses["loss_bbox"].backward(retain_graph=True)  # of the second and last stage
    first, second = model.head.head_series
    initial = model.proposals.init_proposal_boxes.weight
    assert second.bboxes_delta.weight.grad.abs().sum() > 0
    assert first.linear1.weight.grad.abs().sum() > 0  # through the features
    assert first.bboxes_delta.weight.grad.abs().sum() == 0  # boxes are detached between stages
    assert initial.grad.abs().sum() == 0
    losses["loss_bbox_0"].backward()
    assert initial.grad.abs().sum() > 0


@pytest.mark.parametrize("weights", [(10.0, 10.0, 5.0, 5.0), (4.0, 6.0, 3.0, 2.0)])
def test_weights_of_the_box_coder_divide_what_the_stages_predict(weights):
    plain = model_of()
    other = model_of(*options("BOX_WEIGHTS", weights))
    ratio = torch.tensor(weights) / torch.tensor([2.0, 2.0, 1.0, 1.0])
    with torch.no_grad():
        for stage in other.head.head_series:
            stage.bboxes_delta.weight.mul_(ratio.unsqueeze(1))
            stage.bboxes_delta.bias.mul_(ratio)
    losses, expected = other(INPUTS), plain(INPUTS)
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-4, atol=1e-4)


def test_deep_supervision_changes_the_losses_but_not_the_last_stage():
    model = model_of()
    single = model_of(*options("DEEP_SUPERVISION", False), seed=1)
    single.load_state_dict(model.state_dict())
    deep, last = model(INPUTS), single(INPUTS)
    assert set(last) == {"loss_ce", "loss_bbox", "loss_giou"}
    assert len(deep) == 6
    for name, value in last.items():
        torch.testing.assert_close(deep[name], value)


def test_softmax_classification_trains_and_detects():
    model = model_of(*options("USE_FOCAL", False))
    assert "criterion.empty_weight" in model.state_dict()
    train_step(model, batch(SIZES, [2, 0]))
    with torch.no_grad():
        detections = model.eval()(batch(SIZES, [0, 0]))[0]["instances"]
    assert detections.pred_classes.max() < 5
    assert ((detections.scores > 0) & (detections.scores < 1)).all()


@pytest.mark.parametrize("architecture", ["SparseRCNN", "AdaMixer"])
def test_an_early_exit_detects_by_an_earlier_stage_and_changes_no_training(architecture):
    name = ["MODEL.META_ARCHITECTURE", architecture]
    whole, early = (
        model_of(*name, *options("NUM_HEADS", 3, "INFERENCE_STAGES", n)).eval() for n in (0, 2)
    )
    with torch.no_grad():
        stages, _ = whole.raw_predictions(INPUTS, all_stages=True)
        last, _ = early.raw_predictions(INPUTS)
        every, _ = early.raw_predictions(INPUTS, all_stages=True)
    assert last.stage.tolist() == [1]
    assert torch.equal(last.boxes[0], stages.boxes[1])
    assert torch.equal(last.logits[0], stages.logits[1])
    assert torch.equal(every.boxes, stages.boxes)
    assert train_step(early.train(), INPUTS).keys() == train_step(whole.train(), INPUTS).keys()


@pytest.mark.parametrize("deep", [True, False])
def test_predictions_of_all_stages_are_a_parameter_of_the_call_and_change_no_module(deep):
    model = model_of(*DLA, *options("DEEP_SUPERVISION", deep)).eval()
    last, _ = model.raw_predictions(INPUTS)
    with mock.patch.object(torch.nn.Module, "__setattr__", autospec=True) as set_attribute:
        predictions, images = model.raw_predictions(INPUTS, all_stages=True)
    set_attribute.assert_not_called()
    assert not any(m.training for m in model.modules())
    assert images.original_sizes == SIZES
    assert images.sizes[:, :2].tolist() == [[w, h] for h, w in SIZES]
    assert last.stage.tolist() == [1]
    assert predictions.stage.tolist() == [0, 1]
    assert torch.equal(predictions.logits[1:], last.logits)
    assert torch.equal(predictions.boxes[1:], last.boxes)


def test_inputs_follow_the_model_to_another_device():
    assert model_of().to("meta").device.type == "meta"
    # A change of dtype is the one that can be tested without a GPU.
    assert model_of().double().pixel_mean.dtype == torch.float64


def test_the_model_can_be_pickled_and_copied():
    model = model_of().eval()
    inputs = batch([(64, 64)], [0])
    with torch.no_grad():
        expected = model(inputs)[0]["instances"].scores
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(inputs)[0]["instances"].scores, expected)


def test_saving_and_loading_keep_the_official_keys_under_any_prefix():
    model, other = (torch.nn.ModuleDict({"module": model_of()}) for _ in range(2))
    state = model.state_dict()
    assert "init_proposal_boxes.weight" in model["module"].state_dict()
    assert "module.init_proposal_boxes.weight" in state
    assert not any("proposals." in k for k in state)
    report = other.load_state_dict(state)
    assert not report.missing_keys
    assert all(torch.equal(v, state[k]) for k, v in other.state_dict().items())


def test_half_precision_is_finite_and_keeps_boxes_and_losses_in_float32():
    model = model_of()
    with torch.autocast("cpu", torch.bfloat16):
        predictions, _ = model.raw_predictions(INPUTS)
        losses = train_step(model, INPUTS)
    assert predictions.boxes.dtype == torch.float32
    assert all(v.dtype == torch.float32 for v in losses.values())


def test_components_can_be_built_without_a_config():
    stage = RCNNHead(settings=SETTINGS, dynamic_channels=4, roi_positions=9)
    roi_features = RoIFeatures(strides=(8, 16), resolution=3)
    head = DynamicHead(stage=stage, num_stages=2, roi_features=roi_features)
    features = [torch.randn(1, 16, 8, 8), torch.randn(1, 16, 4, 4)]
    predictions = head(features, Proposals(torch.rand(1, 5, 4) * 60, torch.randn(1, 5, 16)))
    assert predictions.logits.shape == (2, 1, 5, 3)
    assert predictions.stage.tolist() == [0, 1]


def test_one_key_selects_the_overlap_of_loss_and_cost():
    model = model_of(*options("OVERLAP", "ciou"))
    assert model.criterion.overlap == model.matcher.costs.overlap == "ciou"
    losses = train_step(model, batch([(64, 96)], [3]))
    assert set(losses) == {f"loss_{n}{s}" for n in ("ce", "bbox", "ciou") for s in ("", "_0")}


def test_batches_are_padded_to_the_least_side_and_detections_stay():
    inputs = batch(SIZES, [2, 1])
    model = model_of("INPUT.PAD_TO", 128).eval()
    images = model.preprocess_image(inputs)
    assert images.tensor.shape == (2, 3, 128, 128)
    assert images.original_sizes == SIZES
    assert images.sizes[:, :2].tolist() == [[w, h] for h, w in SIZES]
    single, both = (x[0]["instances"] for x in (model(inputs[:1]), model(inputs)))
    assert both.image_size == SIZES[0]
    boxes = both.pred_boxes.tensor
    torch.testing.assert_close(single.pred_boxes.tensor, boxes, rtol=1e-3, atol=1e-2)


TRAINED = ["MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", 0]
CHECKPOINT = "MODEL.ACTIVATION_CHECKPOINT"


def trained(*opts):
    model = model_of(*TRAINED, *options("DROPOUT", 0.2), *opts)
    losses = train_step(model, INPUTS)
    return losses, {name: p.grad for name, p in model.named_parameters()}, model.state_dict()


@pytest.mark.parametrize("parts", [("backbone",), ("stages",), ("backbone", "stages")])
def test_checkpointing_changes_neither_losses_nor_gradients_nor_norms_nor_keys(parts):
    for values, expected in zip(trained(CHECKPOINT, parts), trained(), strict=True):
        assert list(values) == list(expected)
        for name, value in expected.items():
            torch.testing.assert_close(values[name], value)


def saved_bytes(*opts):
    """Size of the tensors that autograd keeps for the backward pass."""
    model, kept = model_of(*TRAINED, *opts), {}
    parameters = {p.data_ptr() for p in model.parameters()}

    def keep(x):
        if x.data_ptr() not in parameters:
            kept[x.data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model(INPUTS)
    return sum(kept.values())


def test_checkpointing_saves_memory():
    assert saved_bytes(CHECKPOINT, ("backbone",)) < 0.75 * saved_bytes()
    many = options("NUM_PROPOSALS", 100, "NUM_HEADS", 4)
    assert saved_bytes(*many, CHECKPOINT, ("stages",)) < 0.6 * saved_bytes(*many)


def test_a_copy_of_a_checkpointed_model_is_independent():
    model = model_of(*TRAINED, CHECKPOINT, ("backbone",))
    other = copy.deepcopy(model).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert other(INPUTS)[0]["instances"].pred_boxes.tensor.std() > 0


def test_frozen_modules_keep_parameters_and_statistics():
    model = model_of(*TRAINED)
    freeze_modules(model, ["backbone.bottom_up", "head.head_series.0"])
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    sum(model(batch([(64, 64)], [2])).values()).backward()
    optimizer.step()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    frozen = ("backbone.bottom_up.", "head.head_series.0.")
    assert changed
    assert not any(k.startswith(frozen) for k in changed)


def test_frozen_proposals_of_dpg_keep_their_statistics():
    model = model_of(*DPG)
    freeze_modules(model, ["proposals"])
    before = copy.deepcopy(model.proposals.state_dict())
    assert any("running_mean" in k for k in before)
    model.train()(batch([(64, 64)] * 4, [2] * 4))
    changed = [k for k, v in model.proposals.state_dict().items() if not torch.equal(v, before[k])]
    assert changed == ["step"]  # of the temperature


@pytest.mark.parametrize(("names", "words"), [
    (["head.head_serie.1"], r"'head.head_serie.1'.*head\.head_series\.1"),
    (["backbone", "proposals", "head", "criterion"], "nothing to train"),
])  # fmt: skip
def test_freezing_everything_or_an_unknown_module_is_refused(names, words):
    with pytest.raises(ConfigError, match=words):
        freeze_modules(model_of(), names)


@pytest.mark.parametrize(("opts", "expected"), [
    ([], True), (options("DEEP_SUPERVISION", False), False),
    (["MODEL.ROI_HEADS.IN_FEATURES", ["p3", "p4", "p5"]], False),
])  # fmt: skip
def test_a_model_knows_whether_all_parameters_get_gradients(opts, expected):
    model = model_of(*opts)
    sum(model(batch([(64, 64)], [2])).values()).backward()
    reached = all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert reached == model.all_parameters_get_gradients == expected
