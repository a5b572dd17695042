import logging
import math

import pytest
import torch
from conftest import tiny_cfg

from dsrcnn.config import read_cfg
from dsrcnn.errors import ConfigError
from dsrcnn.solver import build_lr_scheduler, scale_learning_rate, use_epochs


def test_epochs_become_iterations_once():
    cfg = tiny_cfg("SOLVER.IMS_PER_BATCH", 4, "SOLVER.EPOCHS.MAX", 12)
    epochs = cfg.SOLVER.EPOCHS
    epochs.STEPS, epochs.WARMUP, epochs.CHECKPOINT, epochs.EVAL = (8, 11), 0.5, 2.0, 1.0
    use_epochs(cfg, images=203)  # 50.75 iterations an epoch
    solver = cfg.SOLVER
    assert (solver.MAX_ITER, solver.STEPS) == (609, (406, 558))
    assert (solver.WARMUP_ITERS, solver.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD) == (25, 102, 51)
    use_epochs(cfg, images=1000)
    assert solver.MAX_ITER == 609


def test_keys_not_given_in_epochs_stay_and_steps_keep_their_relative_position():
    cfg = tiny_cfg("SOLVER.EPOCHS.MAX", 27, "SOLVER.MAX_ITER", 270000, "SOLVER.WARMUP_ITERS", 7)
    assert cfg.SOLVER.STEPS == (210000, 250000)
    use_epochs(cfg, images=1600)  # 100 iterations an epoch
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS) == (2700, (2100, 2500))
    assert cfg.SOLVER.WARMUP_ITERS == 7


@pytest.mark.parametrize(("images", "epochs", "expected"), [
    (400, 20, 200),  # 2000 iterations: a tenth of them
    (400, 5, 100),  # 500 iterations: an epoch
    (400, 60, 5000),  # 6000 iterations: as it was
    (400, 0.5, 100),  # 50 iterations: never, but the end is saved
])  # fmt: skip
def test_a_run_shorter_than_its_checkpoint_period_has_checkpoints(images, epochs, expected):
    cfg = tiny_cfg("SOLVER.IMS_PER_BATCH", 4, "SOLVER.CHECKPOINT_PERIOD", 5000)
    cfg.SOLVER.EPOCHS.MAX = epochs
    use_epochs(cfg, images)
    assert expected == cfg.SOLVER.CHECKPOINT_PERIOD
    cfg.SOLVER.EPOCHS.MAX, cfg.SOLVER.EPOCHS.CHECKPOINT = epochs, 70.0
    use_epochs(cfg, images)
    assert cfg.SOLVER.CHECKPOINT_PERIOD == 7000  # what is written stays


def test_epochs_of_less_than_a_batch_are_refused():
    with pytest.raises(ConfigError, match="an epoch of 5 images is less than one batch"):
        use_epochs(tiny_cfg("SOLVER.EPOCHS.MAX", 2), images=5)


def test_the_learning_rate_is_scaled_once_with_the_batch_if_there_is_a_reference(caplog):
    cfg = tiny_cfg("SOLVER.BASE_LR", 2.5e-5, "SOLVER.IMS_PER_BATCH", 4)
    scale_learning_rate(cfg)
    assert cfg.SOLVER.BASE_LR == 2.5e-5
    cfg.SOLVER.REFERENCE_BATCH = 16
    with caplog.at_level(logging.INFO):
        scale_learning_rate(cfg)
        scale_learning_rate(cfg)
    assert pytest.approx(6.25e-6) == cfg.SOLVER.BASE_LR
    assert caplog.text.count("becomes 6.25e-06 for 4 images") == 1


def scheduled(cfg, iterations):
    """Learning rate of every iteration."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=cfg.SOLVER.BASE_LR)
    scheduler = build_lr_scheduler(cfg, optimizer)
    rates = []
    for _ in range(iterations):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def rates(*opts, iterations=20):
    cfg = tiny_cfg("SOLVER.MAX_ITER", iterations, "SOLVER.BASE_LR", 1.0, *opts)
    return scheduled(cfg, iterations)


RESTARTS = ["SOLVER.LR_SCHEDULER_NAME", "WarmupCosineRestartsLR", "SOLVER.STEPS"]
NO_WARMUP = ["SOLVER.WARMUP_ITERS", 0]


def test_a_cosine_with_restarts_begins_again_at_every_step():
    expected = [0.5 * (1 + math.cos(math.pi * i / n)) for n in (4, 6, 10) for i in range(n)]
    assert rates(*RESTARTS, (4, 10), *NO_WARMUP) == pytest.approx(expected)


def test_a_cosine_with_restarts_warms_up_once():
    warmup = ["SOLVER.WARMUP_ITERS", 4, "SOLVER.WARMUP_FACTOR", 0.5]
    warm = rates(*RESTARTS, (10,), *warmup, "SOLVER.WARMUP_METHOD", "linear")
    assert (warm[0], warm[10]) == pytest.approx((0.5, 1.0))
    assert warm[4:] == pytest.approx(rates(*RESTARTS, (10,), *NO_WARMUP)[4:])


def test_asag_warms_up_as_published():
    warm = scheduled(read_cfg("coco/asag_a_R50_100pro_1x"), 501)
    expected = [6.66667e-5, 6.69333e-5, 1.33333e-4, 2e-4]
    assert [warm[i] for i in (0, 1, 250, 500)] == pytest.approx(expected, rel=1e-5)


def test_schedules_of_detectron2_are_unchanged():
    steps = ["SOLVER.STEPS", (3,), "SOLVER.GAMMA", 0.1]
    assert rates(*steps, *NO_WARMUP, iterations=5) == pytest.approx([1, 1, 1, 0.1, 0.1])


def test_steps_of_few_images_that_coincide_are_one():
    cfg = tiny_cfg("SOLVER.EPOCHS.MAX", 1.0, "SOLVER.IMS_PER_BATCH", 2, "SOLVER.STEPS", (10, 20))
    use_epochs(cfg, 4)
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS) == (2, ())
    cfg = tiny_cfg("SOLVER.EPOCHS.MAX", 1.0, "SOLVER.EPOCHS.STEPS", (0.1, 0.2, 0.9))
    use_epochs(cfg, 16)
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS) == (1, (1,))
    build_lr_scheduler(cfg, torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0))


def test_a_step_at_the_end_has_no_effect():
    cfg = tiny_cfg("SOLVER.MAX_ITER", 4, "SOLVER.STEPS", (2, 4), "SOLVER.WARMUP_ITERS", 0)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, rates = build_lr_scheduler(cfg, optimizer), []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([1, 1, 0.1, 0.1])
