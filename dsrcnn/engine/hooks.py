"""Hooks of the training loop, one concern each. All processes have the same ones, in one order."""

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..errors import CheckpointError
from ..modeling.roi_heads import DynamicTrainingStats
from ..utils.distributed import mean_over_processes

__all__ = ["AverageNorms", "Checkpoints", "ProgressBar", "average_norms", "precise_norms"]

_LOGGER = logging.getLogger(__name__)


class Checkpoints(HookBase):
    """A checkpoint every `period` iterations, and ``model_final`` at the end.

    One that cannot be written costs neither the run nor the checkpoints before it; only for the
    final one it is an error.
    """

    def __init__(self, checkpointer: DetectionCheckpointer, period: int) -> None:
        self.checkpointer = checkpointer
        self.period = period

    def after_step(self) -> None:
        """Write if it is time."""
        iteration = self.trainer.iter
        if self.period > 0 and (iteration + 1) % self.period == 0:
            try:
                self.checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
            except CheckpointError as error:
                _LOGGER.error("%s Training goes on.", error)
        if iteration + 1 >= self.trainer.max_iter:
            self.checkpointer.save("model_final", iteration=iteration)


class AverageNorms(HookBase):
    """Makes running statistics of batch norms the same on all processes.

    Each process gathers its own. What is evaluated, in parts by all processes, and what is stored,
    by one, is then one model.
    """

    def __init__(self, models: list[nn.Module], is_turn: Callable[[int], bool]) -> None:
        """Take models, and whether it is time after an iteration (counted from 1)."""
        self.models = models
        self.is_turn = is_turn

    def after_step(self) -> None:
        """Average if it is time."""
        if self.is_turn(self.trainer.iter + 1):
            for model in self.models:
                average_norms(model)


@torch.no_grad()
def average_norms(model: nn.Module) -> None:
    """Average the running statistics of batch norms over all processes, in one collective.

    What else each process has of its own, and a checkpoint needs of all, is brought together too.
    """
    for module in model.modules():
        if isinstance(module, DynamicTrainingStats):
            module.share()
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    statistics = [x for m in norms for x in (m.running_mean, m.running_var) if x is not None]
    if comm.get_world_size() == 1 or not statistics:
        return
    means = mean_over_processes(torch.cat(statistics))
    for own, mean in zip(statistics, means.split([len(x) for x in statistics]), strict=True):
        own.copy_(mean)


def precise_norms(
    cfg: CfgNode, models: list[nn.Module], build_loader: Callable[[CfgNode], Any]
) -> list[HookBase]:
    """Detectron2's ``TEST.PRECISE_BN`` for several models: weights and their average, say."""
    if not (cfg.TEST.PRECISE_BN.ENABLED and get_bn_modules(models[0])):
        return []
    plain = cfg.clone()
    plain.defrost()
    plain.DATALOADER.NUM_WORKERS = 0  # rarely used, so no processes of its own
    period, count = cfg.TEST.EVAL_PERIOD, cfg.TEST.PRECISE_BN.NUM_ITER
    return [hooks.PreciseBN(period, model, build_loader(plain), count) for model in models]


class ProgressBar(HookBase):
    """A bar with the remaining time, the loss and the last AP, on a terminal only.

    Log lines are written above the bar. Without a terminal the log alone tells, as in Detectron2.
    """

    def __init__(self, metric: str = "bbox/AP") -> None:
        """Take the metric to show beside the loss."""
        self.metric = metric
        self._stack = contextlib.ExitStack()
        self._bar: tqdm | None = None

    def before_train(self) -> None:
        """Draw the bar, at the right place after a resume."""
        if not comm.is_main_process():
            return
        trainer = self.trainer
        self._bar = tqdm(
            total=trainer.max_iter,
            initial=trainer.start_iter,
            desc="training",
            unit="it",
            dynamic_ncols=True,
            disable=None,  # None: only where stderr is a terminal
        )
        if not self._bar.disable:
            loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore", "dsrcnn")]
            self._stack.enter_context(logging_redirect_tqdm(loggers))

    def after_step(self) -> None:
        """Advance by one."""
        if self._bar is not None:
            latest = self.trainer.storage.latest()
            shown = {"loss": "total_loss", self.metric.rsplit("/", 1)[-1]: self.metric}
            values = {name: f"{latest[key][0]:.2f}" for name, key in shown.items() if key in latest}
            self._bar.set_postfix(values, refresh=False)
            self._bar.update()

    def after_train(self) -> None:
        """Leave the finished bar on the screen."""
        if self._bar is not None:
            self._bar.close()
        self._stack.close()
