"""Length of a training run and its learning rate schedule."""

import itertools
import logging

import torch
from detectron2.config import CfgNode
from detectron2.solver import LRMultiplier, WarmupParamScheduler
from detectron2.solver import build_lr_scheduler as build_detectron2_scheduler
from fvcore.common.param_scheduler import CompositeParamScheduler, CosineParamScheduler

from ..errors import ConfigError

_LOGGER = logging.getLogger(__name__)


def use_epochs(cfg: CfgNode, images: int) -> None:
    """Convert ``SOLVER.EPOCHS`` into iterations over a number of training images, in place.

    Reads the final ``SOLVER.IMS_PER_BATCH`` and resets ``EPOCHS``. Without ``EPOCHS.STEPS``,
    ``SOLVER.STEPS`` keep their relative position in the schedule. Without ``EPOCHS.CHECKPOINT``, a
    ``CHECKPOINT_PERIOD`` that the run would never reach becomes the larger of an epoch and a tenth
    of the run.

    Raises:
        ConfigError: if there are fewer images than in a batch.
    """
    solver, epochs, batch = cfg.SOLVER, cfg.SOLVER.EPOCHS, cfg.SOLVER.IMS_PER_BATCH
    if not epochs.MAX:
        return
    if images < batch:
        raise ConfigError(
            f"SOLVER.EPOCHS.MAX is {epochs.MAX:g}, but an epoch of {images} images is less than "
            f"one batch. Write SOLVER.IMS_PER_BATCH {images} or less, or use SOLVER.MAX_ITER."
        )
    per_epoch = images / batch

    def iterations(count: float) -> int:
        return max(1, round(count * per_epoch))

    stretch = iterations(epochs.MAX) / solver.MAX_ITER
    solver.MAX_ITER = iterations(epochs.MAX)
    if epochs.STEPS:
        steps = {iterations(step) for step in epochs.STEPS}
    else:
        steps = {round(step * stretch) for step in solver.STEPS}
    solver.STEPS = tuple(sorted(steps - {0}))  # few images: steps may coincide
    if epochs.WARMUP:
        solver.WARMUP_ITERS = iterations(epochs.WARMUP)
    if epochs.CHECKPOINT:
        solver.CHECKPOINT_PERIOD = iterations(epochs.CHECKPOINT)
    elif solver.CHECKPOINT_PERIOD >= solver.MAX_ITER:
        solver.CHECKPOINT_PERIOD = max(iterations(1), round(solver.MAX_ITER / 10))
    if epochs.EVAL:
        cfg.TEST.EVAL_PERIOD = iterations(epochs.EVAL)
    _LOGGER.info(
        "%g epochs of %d images in batches of %d: MAX_ITER %d, STEPS %s, WARMUP_ITERS %d, "
        "CHECKPOINT_PERIOD %d, EVAL_PERIOD %d.",
        *(epochs.MAX, images, batch, solver.MAX_ITER, solver.STEPS, solver.WARMUP_ITERS),
        *(solver.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD),
    )
    if solver.WARMUP_ITERS >= solver.MAX_ITER / 2:
        _LOGGER.warning(
            "SOLVER.WARMUP_ITERS is %d of SOLVER.MAX_ITER %d: the learning rate reaches BASE_LR "
            "late or never. Write SOLVER.EPOCHS.WARMUP, such as 0.5.",
            *(solver.WARMUP_ITERS, solver.MAX_ITER),
        )
    epochs.MAX, epochs.STEPS = 0.0, ()
    epochs.WARMUP = epochs.CHECKPOINT = epochs.EVAL = 0.0


def scale_learning_rate(cfg: CfgNode) -> None:
    """Scale ``BASE_LR`` linearly from ``SOLVER.REFERENCE_BATCH`` to ``IMS_PER_BATCH``, in place.

    ``REFERENCE_BATCH`` is set to the batch size, so a second call has no effect (linear scaling
    rule, arXiv 1706.02677).
    """
    solver = cfg.SOLVER
    if solver.REFERENCE_BATCH in (0, solver.IMS_PER_BATCH):
        return
    before = solver.BASE_LR
    solver.BASE_LR = before * solver.IMS_PER_BATCH / solver.REFERENCE_BATCH
    _LOGGER.info(
        "SOLVER.BASE_LR %g, meant for %d images, becomes %g for %d images.",
        *(before, solver.REFERENCE_BATCH, solver.BASE_LR, solver.IMS_PER_BATCH),
    )
    solver.REFERENCE_BATCH = solver.IMS_PER_BATCH


def build_lr_scheduler(
    cfg: CfgNode, optimizer: torch.optim.Optimizer
) -> torch.optim.lr_scheduler.LRScheduler:
    """Build one of Detectron2's schedules, or ``WarmupCosineRestartsLR``.

    The latter decays along a cosine from ``BASE_LR`` to zero and restarts at each of
    ``SOLVER.STEPS`` (arXiv 1608.03983, with cycles of any length).
    """
    solver = cfg.SOLVER
    if solver.LR_SCHEDULER_NAME != "WarmupCosineRestartsLR":
        if solver.MAX_ITER in solver.STEPS:  # an error of Detectron2, without effect
            cfg = cfg.clone()
            cfg.defrost()
            cfg.SOLVER.STEPS = tuple(step for step in solver.STEPS if step != solver.MAX_ITER)
        return build_detectron2_scheduler(cfg, optimizer)
    ends = [0, *(step for step in solver.STEPS if 0 < step < solver.MAX_ITER), solver.MAX_ITER]
    lengths = [(end - start) / solver.MAX_ITER for start, end in itertools.pairwise(ends)]
    cycles = [CosineParamScheduler(1.0, 0.0) for _ in lengths]
    schedule = CompositeParamScheduler(cycles, lengths, ["rescaled"] * len(cycles))
    warmup = min(solver.WARMUP_ITERS / solver.MAX_ITER, 1.0)
    schedule = WarmupParamScheduler(schedule, solver.WARMUP_FACTOR, warmup, solver.WARMUP_METHOD)
    return LRMultiplier(optimizer, multiplier=schedule, max_iter=solver.MAX_ITER)
