import logging
import math

import pytest
import torch
from conftest import tiny_cfg

from dsrcnn.config import read_cfg
from dsrcnn.errors import ConfigError
from dsrcnn.solver import build_lr_scheduler, scale_learning_rate, use_epochs


def test_epochs_become_iterations():
    cfg = tiny_cfg("SOLVER.IMS_PER_BATCH", 4, "SOLVER.EPOCHS.MAX", 12)
    epochs = cfg.SOLVER.EPOCHS
    epochs.STEPS, epochs.WARMUP, epochs.CHECKPOINT, epochs.EVAL = (8, 11), 0.5, 2.0, 1.0
    use_epochs(cfg, images=203)  # 50.75 iterations an epoch
    solver = cfg.SOLVER
    assert (solver.MAX_ITER, solver.STEPS) == (609, (406, 558))
    assert (solver.WARMUP_ITERS, solver.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD) == (25, 102, 51)
    use_epochs(cfg, images=1000)
    assert solver.MAX_ITER == 609  # once and for all


def test_what_is_not_given_in_epochs_stays_in_iterations():
    cfg = tiny_cfg("SOLVER.EPOCHS.MAX", 2, "SOLVER.WARMUP_ITERS", 7)
    use_epochs(cfg, images=160)
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.WARMUP_ITERS) == (20, 7)


def test_steps_that_are_not_given_in_epochs_keep_their_place_in_the_schedule():
    cfg = tiny_cfg("SOLVER.EPOCHS.MAX", 27, "SOLVER.MAX_ITER", 270000)
    assert cfg.SOLVER.STEPS == (210000, 250000)
    use_epochs(cfg, images=1600)  # 100 iterations an epoch
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS) == (2700, (2100, 2500))


def test_less_data_than_a_batch_have_no_epochs():
    with pytest.raises(ConfigError, match="an epoch of 5 images is less than one batch"):
        use_epochs(tiny_cfg("SOLVER.EPOCHS.MAX", 2), images=5)


def test_the_learning_rate_follows_the_batch_and_the_log_says_so(caplog):
    cfg = tiny_cfg("SOLVER.BASE_LR", 2.5e-5, "SOLVER.REFERENCE_BATCH", 16)
    cfg.SOLVER.IMS_PER_BATCH = 4
    with caplog.at_level(logging.INFO):
        scale_learning_rate(cfg)
        scale_learning_rate(cfg)
    assert pytest.approx(6.25e-6) == cfg.SOLVER.BASE_LR
    assert caplog.text.count("becomes 6.25e-06 for 4 images") == 1


def test_without_a_reference_the_learning_rate_is_what_is_written():
    cfg = tiny_cfg("SOLVER.IMS_PER_BATCH", 2)
    scale_learning_rate(cfg)
    assert cfg.SOLVER.BASE_LR == 2.5e-5


def rates(*opts, iterations):
    cfg = tiny_cfg("SOLVER.MAX_ITER", iterations, "SOLVER.BASE_LR", 1.0, *opts)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = build_lr_scheduler(cfg, optimizer)
    found = []
    for _ in range(iterations):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_a_cosine_with_restarts_begins_anew_at_every_step():
    opts = ["SOLVER.LR_SCHEDULER_NAME", "WarmupCosineRestartsLR", "SOLVER.STEPS", (4, 10)]
    found = rates(*opts, "SOLVER.WARMUP_ITERS", 0, iterations=20)
    expected = [
        0.5 * (1 + math.cos(math.pi * i / length)) for length in (4, 6, 10) for i in range(length)
    ]
    assert found == pytest.approx(expected)


def test_a_cosine_with_restarts_warms_up_once():
    opts = ["SOLVER.LR_SCHEDULER_NAME", "WarmupCosineRestartsLR", "SOLVER.STEPS", (10,)]
    warm = ["SOLVER.WARMUP_ITERS", 4, "SOLVER.WARMUP_FACTOR", 0.5, "SOLVER.WARMUP_METHOD", "linear"]
    found = rates(*opts, *warm, iterations=20)
    assert found[0] == pytest.approx(0.5)
    assert found[10] == pytest.approx(1.0)
    assert found[4:] == pytest.approx(rates(*opts, "SOLVER.WARMUP_ITERS", 0, iterations=20)[4:])


def test_asag_warms_up_as_published():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-4)
    scheduler = build_lr_scheduler(read_cfg("coco/asag_a_R50_100pro_1x"), optimizer)
    found = []
    for _ in range(501):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    expected = [6.66667e-5, 6.69333e-5, 1.33333e-4, 2e-4]
    assert [found[i] for i in (0, 1, 250, 500)] == pytest.approx(expected, rel=1e-5)


def test_detectron2s_schedules_are_as_ever():
    found = rates("SOLVER.STEPS", (3,), "SOLVER.GAMMA", 0.1, "SOLVER.WARMUP_ITERS", 0, iterations=5)
    assert found == pytest.approx([1, 1, 1, 0.1, 0.1])
