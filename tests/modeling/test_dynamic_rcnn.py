"""Dynamic R-CNN as a detector: off is Faster R-CNN, state, hard images, log, masks."""

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
from dsrcnn.engine.checkpoint import ReportingCheckpointer
from dsrcnn.engine.ema import AveragedWeights
from dsrcnn.engine.eval_hooks import losses_without_learning
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


def model_of(*opts, **options):
    torch.manual_seed(0)
    return build_model(cfg_of(*opts, **options)).train()


def losses_of(model, inputs, seed=1, start=0):
    torch.manual_seed(seed)
    with EventStorage(start) as storage:
        return model(inputs), storage


def numbers(model):
    stats = model.roi_heads.dynamic
    return stats.iou_thresh.item(), stats.beta.item()


def test_switched_off_it_is_faster_rcnn_to_the_last_bit():
    plain, model = model_of(*STATIC), model_of(*OFF)
    model.load_state_dict(plain.state_dict(), strict=False)
    inputs = batch(SIZES, [3, 2])
    expected, found = losses_of(plain, inputs)[0], losses_of(model, inputs)[0]
    assert all(torch.equal(found[k], v) for k, v in expected.items())


@pytest.mark.parametrize("opts", [[], OFF])
def test_inference_is_that_of_faster_rcnn(opts):
    plain, model = model_of(*STATIC).eval(), model_of(*opts).eval()
    model.load_state_dict(plain.state_dict(), strict=False)
    for a, b in zip(plain(batch(SIZES, [0, 0])), model(batch(SIZES, [0, 0])), strict=True):
        assert torch.equal(a["instances"].pred_boxes.tensor, b["instances"].pred_boxes.tensor)
        assert torch.equal(a["instances"].scores, b["instances"].scores)


def test_the_state_is_five_keys_and_weights_go_both_ways():
    plain, model = model_of(*STATIC), model_of()
    own, other = set(model.state_dict()), set(plain.state_dict())
    names = {"iou_thresh", "beta", "iou_hist", "err_hist", "step"}
    assert own - other == {f"roi_heads.dynamic.{name}" for name in names}
    assert not other - own
    model.roi_heads.dynamic.iou_thresh.fill_(0.55)
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert not missing
    assert not unexpected
    assert numbers(model)[0] == pytest.approx(0.55)  # what the weights do not say stays


def test_training_follows_the_proposals_and_a_resumed_one_too():
    inputs = [batch(SIZES, [3, 2], seed=i) for i in range(8)]

    def train(model, part):
        for number in part:
            losses_of(model, inputs[number], seed=number)

    limits = [
        f"{NODE}WARMUP_IOU",
        0.05,
        f"{NODE}WARMUP_BETA",
        10.0,
    ]
    whole = model_of(*limits)
    train(whole, range(8))
    assert whole.roi_heads.dynamic.step.item() == 8
    threshold, beta = numbers(whole)
    assert threshold > 0.05
    assert beta < 10.0
    first, second = (model_of(*limits) for _ in range(2))
    train(first, range(6))
    second.load_state_dict(first.state_dict())
    train(second, range(6, 8))
    assert numbers(second) == numbers(whole)


@pytest.mark.parametrize("counts", [[0, 0], [1, 0], [90, 60]])
@pytest.mark.parametrize(
    "opts",
    [
        [],
        [f"{NODE}COUNT_GT", False],
        [f"{NODE}BETA_SOURCE", "all"],
        [f"{NODE}BETA_SOURCE", "all", f"{NODE}COUNT_GT", False],
        [f"{NODE}IOU_RANK", "batch"],
        [f"{NODE}MAX_IOU", 0.7, f"{NODE}SYNC", False],
        ["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True],
        ["MODEL.ROI_HEADS.PROPOSAL_APPEND_GT", False],
    ],
)
def test_empty_single_and_crowded_images_train(counts, opts):
    model = model_of(*opts, f"{NODE}ITERATION_COUNT", 1)
    for seed in range(3):  # the third one with numbers of the second
        losses, _ = losses_of(model, batch(SIZES, counts, seed=seed))
        model.zero_grad()
        sum(losses.values()).backward()
        assert all(torch.isfinite(v) for v in losses.values())
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        assert all(torch.isfinite(g).all() for g in grads)
    threshold, beta = numbers(model)
    assert 0.4 <= threshold <= 1
    assert 0 < beta <= 1


def test_a_transition_point_of_zero_without_dynamics_is_l1():
    model = model_of(*OFF, "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA", 0.0)
    losses, _ = losses_of(model, batch(SIZES, [3, 2]))
    losses["loss_box_reg"].backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_nothing_is_recorded_without_gradients_or_in_evaluation():
    model = model_of()
    with torch.no_grad():
        losses_of(model, batch(SIZES, [3, 2]))
    model.eval()(batch(SIZES, [3, 2]))
    assert model.roi_heads.dynamic.step.item() == 0


def test_the_log_has_the_numbers_in_use_and_the_statistics():
    model = model_of()
    _, storage = losses_of(model, batch(SIZES, [3, 2]), start=19)
    logged = {k: v for k, (v, _) in storage.latest().items() if k.startswith("dynamic_rcnn/")}
    assert logged["dynamic_rcnn/iou_thresh"] == pytest.approx(0.4)
    assert logged["dynamic_rcnn/beta"] == 1.0
    assert 0 <= logged["dynamic_rcnn/iou_stat"] <= 1
    assert math.isfinite(logged["dynamic_rcnn/err_stat"])
    _, storage = losses_of(model, batch(SIZES, [0, 0]), start=19)
    assert "dynamic_rcnn/iou_stat" not in storage.latest()  # nothing to measure


def test_an_average_of_weights_takes_the_state_as_it_is():
    model = model_of()
    average = AveragedWeights(model, decay=0.9)
    average.start()
    for seed in range(6):
        losses_of(model, batch(SIZES, [3, 2], seed=seed))
        average.update()
    for name, buffer in model.roi_heads.dynamic.named_buffers():
        found = average.weights()[f"roi_heads.dynamic.{name}"]
        torch.testing.assert_close(found, buffer, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("strict", [False, True])
def test_a_file_with_windows_of_another_length_is_taken(tmp_path, strict):
    model, other = model_of(), model_of(f"{NODE}ITERATION_COUNT", 7)
    for seed in range(5):
        losses_of(model, batch(SIZES, [3, 2], seed=seed))
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    ReportingCheckpointer(other, strict=strict).load(str(tmp_path / "model.pth"))
    assert numbers(other) == numbers(model)
    assert other.roi_heads.dynamic.step.item() == 0


def test_one_switch_at_a_time_logs_what_is_in_use():
    for switch, logged, other in (
        ("IOU_ENABLED", "beta", "iou_thresh"),
        ("BETA_ENABLED", "iou_thresh", "beta"),
    ):
        model = model_of(f"{NODE}{switch}", False)
        _, storage = losses_of(model, batch(SIZES, [3, 2]), start=19)
        assert f"dynamic_rcnn/{logged}" in storage.latest()
        assert f"dynamic_rcnn/{other}" not in storage.latest()


def test_losses_on_test_data_leave_the_log_of_the_training():
    model = model_of()
    with EventStorage(19) as storage:
        storage.put_scalar("roi_head/num_fg_samples", -1.0)
        with losses_without_learning(model):
            model(batch(SIZES, [3, 2]))
        assert storage.latest()["roi_head/num_fg_samples"][0] == -1.0
    with losses_without_learning(model):  # and need none
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
    drawn = ["draw", *saved, "--images", "1", "--output", str(tmp_path / "drawn"), *weights]
    assert main(drawn) == 0
    assert len(list((tmp_path / "drawn").glob("*.png"))) == 1


def test_commands_that_look_at_stages_refuse_it(capsys):
    config = ["--config-file", "quick/dynamic_rcnn_shapes"]
    for command in ("assignment", "recollection"):
        assert main([command, *config, "--output", "nowhere"]) == 2
        assert "GeneralizedRCNN has none" in capsys.readouterr().err
    assert main(["benchmark-recollection", *config]) == 2
    assert "GeneralizedRCNN has none" in capsys.readouterr().err


def test_mask_heads_train_beside_it():
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


def test_biases_learn_twice_as_fast_without_decay():
    cfg = cfg_of(config="dynamic_rcnn/dynamic_rcnn_R_50_FPN_1x")
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
    model = build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    settings = {
        id(p): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            expected = (0.04, 0.0) if name.endswith("bias") else (0.02, 1e-4)
            assert settings[id(parameter)] == pytest.approx(expected), name


@pytest.mark.parametrize(
    ("opts", "words"),
    [
        ([f"{NODE}KI", 0], "KI is 0"),
        ([f"{NODE}IOU_RANK", "all"], "IOU_RANK is 'all'"),
        ([f"{NODE}BETA_SOURCE", "raw"], "BETA_SOURCE is 'raw'"),
        ([f"{NODE}WARMUP_IOU", 0.8, f"{NODE}MAX_IOU", 0.7], "WARMUP_IOU 0.8 and MAX_IOU 0.7"),
        ([f"{NODE}WARMUP_BETA", 0.0], "WARMUP_BETA is 0.0"),
        (["MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", "giou"], "no transition point"),
        (["MODEL.ROI_HEADS.IOU_THRESHOLDS", [0.3, 0.5]], "has one threshold"),
        (["MODEL.ROI_HEADS.NUM_CLASSES", 0], "write the number of classes"),
    ],
)
def test_values_that_cannot_work_are_refused(opts, words):
    with pytest.raises(ConfigError, match=words):
        check_config(cfg_of(*opts))
