"""Dynamic R-CNN as a detector."""

import math

import numpy as np
import pytest
import torch
from conftest import batch, coco_options
from detectron2.modeling import build_model
from detectron2.structures import PolygonMasks
from detectron2.utils.events import EventStorage

from dsrcnn.cli.main import main
from dsrcnn.config import check_config, read_cfg
from dsrcnn.engine.checkpoint import Checkpointer
from dsrcnn.engine.ema import AveragedWeights
from dsrcnn.engine.eval_hooks import eval_loss_mode
from dsrcnn.engine.main import run
from dsrcnn.errors import ConfigError
from dsrcnn.solver import build_optimizer

NODE = "MODEL.DYNAMIC_RCNN."
SMALL = [
    *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.ROI_HEADS.NUM_CLASSES", 5),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", 32, "MODEL.FPN.OUT_CHANNELS", 32),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 32, f"{NODE}ITERATION_COUNT", 4, f"{NODE}KI", 5),
]
SIZES = [(64, 96), (96, 64)]
OFF = [f"{NODE}IOU_ENABLED", False, f"{NODE}BETA_ENABLED", False]
STATIC = ["MODEL.ROI_HEADS.NAME", "StandardROIHeads"]


def cfg_of(*opts, config="quick/dynamic_rcnn_shapes"):
    return read_cfg(config, [*SMALL, *opts])


def model_of(*opts):
    torch.manual_seed(0)
    return build_model(cfg_of(*opts)).train()


def losses_of(model, inputs, seed=1, start=0):
    torch.manual_seed(seed)
    with EventStorage(start) as storage:
        return model(inputs), storage


def train(model, start, end):
    for seed in range(start, end):
        losses_of(model, batch(SIZES, [3, 2], seed=seed), seed=seed)


def settings_of(model):
    stats = model.roi_heads.dynamic
    return stats.iou_thresh.item(), stats.beta.item()


def test_losses_with_both_switches_off_equal_those_of_faster_rcnn():
    plain, model = model_of(*STATIC), model_of(*OFF)
    model.load_state_dict(plain.state_dict(), strict=False)
    inputs = batch(SIZES, [3, 2])
    expected, losses = losses_of(plain, inputs)[0], losses_of(model, inputs)[0]
    assert all(torch.equal(losses[k], v) for k, v in expected.items())


@pytest.mark.parametrize("opts", [[], OFF])
def test_inference_equals_that_of_faster_rcnn(opts):
    plain, model = model_of(*STATIC).eval(), model_of(*opts).eval()
    model.load_state_dict(plain.state_dict(), strict=False)
    for a, b in zip(plain(batch(SIZES, [0, 0])), model(batch(SIZES, [0, 0])), strict=True):
        assert torch.equal(a["instances"].pred_boxes.tensor, b["instances"].pred_boxes.tensor)
        assert torch.equal(a["instances"].scores, b["instances"].scores)


def test_the_state_adds_five_keys_and_weights_of_faster_rcnn_keep_it():
    plain, model = model_of(*STATIC), model_of()
    added = set(model.state_dict()) - set(plain.state_dict())
    names = {"iou_thresh", "beta", "iou_hist", "err_hist", "step"}
    assert added == {f"roi_heads.dynamic.{name}" for name in names}
    model.roi_heads.dynamic.iou_thresh.fill_(0.55)
    assert not any(model.load_state_dict(plain.state_dict(), strict=False))
    assert settings_of(model)[0] == pytest.approx(0.55)


def test_settings_follow_the_proposals_also_in_a_resumed_training():
    limits = [f"{NODE}WARMUP_IOU", 0.05, f"{NODE}WARMUP_BETA", 10.0]
    whole = model_of(*limits)
    train(whole, 0, 8)
    assert whole.roi_heads.dynamic.step.item() == 8
    threshold, beta = settings_of(whole)
    assert threshold > 0.05
    assert beta < 10.0
    first, second = (model_of(*limits) for _ in range(2))
    train(first, 0, 6)
    second.load_state_dict(first.state_dict())
    train(second, 6, 8)
    assert settings_of(second) == settings_of(whole)


@pytest.mark.parametrize("counts", [[0, 0], [1, 0], [90, 60]])
@pytest.mark.parametrize("opts", [
    [], [f"{NODE}COUNT_GT", False], [f"{NODE}MAX_IOU", 0.7],
    ["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True],
    ["MODEL.ROI_HEADS.PROPOSAL_APPEND_GT", False],
])  # fmt: skip
def test_empty_single_and_crowded_images_train(counts, opts):
    model = model_of(*opts, f"{NODE}ITERATION_COUNT", 1)
    for seed in range(3):  # the third one with the settings of the second
        losses, _ = losses_of(model, batch(SIZES, counts, seed=seed))
        model.zero_grad()
        sum(losses.values()).backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        assert all(torch.isfinite(x).all() for x in (*losses.values(), *grads))
    threshold, beta = settings_of(model)
    assert 0.4 <= threshold <= 1
    assert 0 < beta <= 1


def test_nothing_is_recorded_without_gradients_or_in_evaluation():
    model = model_of()
    with torch.no_grad():
        losses_of(model, batch(SIZES, [3, 2]))
    model.eval()(batch(SIZES, [3, 2]))
    assert model.roi_heads.dynamic.step.item() == 0


def logged(model, counts=(3, 2)):
    _, storage = losses_of(model, batch(SIZES, counts), start=19)
    prefix = "dynamic_rcnn/"
    values = storage.latest().items()
    return {k.removeprefix(prefix): v for k, (v, _) in values if k.startswith(prefix)}


def test_statistics_and_settings_of_the_iteration_are_logged_unless_switched_off():
    model = model_of()
    scalars = logged(model)
    assert scalars["iou_thresh"] == pytest.approx(0.4)
    assert scalars["beta"] == 1.0
    assert 0 <= scalars["iou_stat"] <= 1
    assert math.isfinite(scalars["err_stat"])
    assert set(logged(model, [0, 0])) == {"iou_thresh", "beta"}  # nothing to measure
    for switch, setting in (("IOU_ENABLED", "beta"), ("BETA_ENABLED", "iou_thresh")):
        names = set(logged(model_of(f"{NODE}{switch}", False)))
        assert names == {setting, "iou_stat", "err_stat"}


def test_the_error_is_ranked_over_all_images_of_the_process_not_image_by_image(monkeypatch):
    model = model_of(f"{NODE}KE", 2, f"{NODE}COUNT_GT", False, f"{NODE}WARMUP_IOU", 0.1)
    sample, sampled = model.roi_heads.label_and_sample_proposals, []
    monkeypatch.setattr(
        model.roi_heads,
        "label_and_sample_proposals",
        lambda *args: sampled.extend(sample(*args)) or sampled,
    )
    error = logged(model)["err_stat"]
    errors = []  # of each image
    for image in sampled:
        boxes, targets = image.proposal_boxes, image.gt_boxes
        shift = (targets.get_centers() - boxes.get_centers()) * 10  # the box coder's weights
        size = boxes.tensor[:, 2:] - boxes.tensor[:, :2]
        values = (shift / size).abs().mean(dim=1)[image.gt_classes < 5].tolist()
        errors.append(sorted(v for v in values if v > 0))
    assert error == pytest.approx(sorted(v for e in errors for v in e)[2 * 2 - 1], rel=1e-5)
    assert error != pytest.approx(np.mean([e[2 - 1] for e in errors]), rel=0.01)


def test_averaged_weights_copy_the_state():
    model = model_of()
    average = AveragedWeights(model, decay=0.9)
    average.start()
    for seed in range(6):
        train(model, seed, seed + 1)
        average.update()
    for name, buffer in model.roi_heads.dynamic.named_buffers():
        copied = average.weights()[f"roi_heads.dynamic.{name}"]
        torch.testing.assert_close(copied, buffer, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("strict", [False, True])
def test_a_file_with_windows_of_another_length_is_loaded(tmp_path, strict):
    model, other = model_of(), model_of(f"{NODE}ITERATION_COUNT", 7)
    train(model, 0, 5)
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    Checkpointer(other, strict=strict).load(str(tmp_path / "model.pth"))
    assert settings_of(other) == settings_of(model)
    assert other.roi_heads.dynamic.step.item() == 0


def test_losses_on_test_data_are_not_logged_as_training():
    model = model_of()
    with EventStorage(19) as storage:
        storage.put_scalar("roi_head/num_fg_samples", -1.0)
        with eval_loss_mode(model):
            model(batch(SIZES, [3, 2]))
        assert storage.latest()["roi_head/num_fg_samples"][0] == -1.0
    with eval_loss_mode(model):  # without any storage
        model(batch(SIZES, [3, 2]))


@pytest.mark.parametrize(
    ("images", "parts", "window"), [(4, 1, 4), (4, 2, 8), (4, 3, 8), (2, 4, 8)]
)
def test_a_window_has_an_entry_for_every_part_of_a_batch(images, parts, window):
    model = model_of("SOLVER.IMS_PER_BATCH", images, "SOLVER.ACCUMULATE", parts)
    assert model.roi_heads.dynamic.window == window


def test_it_trains_resumes_evaluates_and_draws_from_the_command_line(tmp_path):
    output = tmp_path / "run"
    words = [*map(str, SMALL), "MODEL.ROI_HEADS.NUM_CLASSES", "0", "MODEL.EMA.ENABLED", "True"]
    words += ["INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64", "TEST.EVAL_PERIOD", "0"]
    words += ["SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "4", "SOLVER.CHECKPOINT_PERIOD", "2"]
    words += ["LOG.IMAGES", "1", "TEST.LOSS", "True", "OUTPUT_DIR", str(output)]
    words += coco_options(tmp_path)
    config = ["--config-file", "quick/dynamic_rcnn_shapes"]
    assert run([*config, *words]) == 0
    whole = torch.load(output / "model_final.pth")["model"]
    for name in ("model_final.pth", "model_0000003.pth", "model_best.pth"):
        (output / name).unlink(missing_ok=True)
    (output / "last_checkpoint").write_text("model_0000001.pth")
    assert run(["--resume", *config, *words]) == 0
    resumed = torch.load(output / "model_final.pth")["model"]
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, equal_nan=True, rtol=0, atol=0)
    weights = ["MODEL.WEIGHTS", str(output / "model_final.pth")]
    saved = ["--config-file", str(output / "config.yaml")]
    views = ["TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", "(64, 96)"]
    assert run(["--eval-only", *saved, *weights, *views]) == 0
    drawn = ["--images", "1", "--output", str(tmp_path / "drawn"), *weights]
    assert main(["draw", "predictions", *saved, *drawn]) == 0
    assert len(list((tmp_path / "drawn").glob("*.png"))) == 1


@pytest.mark.parametrize("drawing", ["assignment", "recollection"])
def test_drawings_of_stages_refuse_it(drawing, tmp_path, capsys):
    config = ["--config-file", "quick/dynamic_rcnn_shapes", "MODEL.WEIGHTS", "model.pth"]
    assert main(["draw", drawing, *config, "--output", str(tmp_path / "new")]) == 2
    assert "needs SparseRCNN" in capsys.readouterr().err


def test_mask_heads_train_with_it():
    masks = ["MODEL.MASK_ON", True, "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"]
    masks += ["MODEL.ROI_MASK_HEAD.NUM_CONV", 1, "MODEL.ROI_MASK_HEAD.CONV_DIM", 16]
    model = model_of(*masks)
    inputs = batch(SIZES, [3, 2])
    for record in inputs:
        boxes = record["instances"].gt_boxes.tensor
        corners = [[np.array([x1, y1, x2, y1, x2, y2])] for x1, y1, x2, y2 in boxes.tolist()]
        record["instances"].gt_masks = PolygonMasks(corners)
    losses, _ = losses_of(model, inputs)
    assert torch.isfinite(losses["loss_mask"])
    sum(losses.values()).backward()


def test_biases_have_twice_the_learning_rate_and_no_decay():
    cfg = cfg_of(config="dynamic_rcnn/dynamic_rcnn_R_50_FPN_1x")
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
    model = build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    for group in optimizer.param_groups:
        for name in (names.pop(id(p)) for p in group["params"]):
            expected = (0.04, 0.0) if name.endswith("bias") else (0.02, 1e-4)
            assert (group["lr"], group["weight_decay"]) == pytest.approx(expected), name
    assert not names


@pytest.mark.parametrize(("opts", "words"), [
    ([f"{NODE}KI", 0], "KI is 0"),
    ([f"{NODE}WARMUP_IOU", 0.8, f"{NODE}MAX_IOU", 0.7], "WARMUP_IOU 0.8 and MAX_IOU 0.7"),
    ([f"{NODE}WARMUP_BETA", 0.0], "WARMUP_BETA is 0.0"),
    (["MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", "giou"], "no transition point"),
    (["MODEL.ROI_HEADS.IOU_THRESHOLDS", [0.3, 0.5]], "has one threshold"),
    (["MODEL.ROI_HEADS.NUM_CLASSES", 0], "write the number of classes"),
])  # fmt: skip
def test_invalid_values_are_refused(opts, words):
    with pytest.raises(ConfigError, match=words):
        check_config(cfg_of(*opts))
