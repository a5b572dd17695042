"""Hooks of the training loop. All processes have the same hooks in the same order."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from fvcore.nn.precise_bn import get_bn_modules
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from ..errors import CheckpointError, NonFiniteLossError
from ..layers.norm import RunningNorm
from ..utils.distributed import reduce_mean
from ..utils.training import TrainingState
from .checkpoint import Checkpointer
from .console import progress_bar
from .writers import TrackerWriter

_LOGGER = logging.getLogger(__name__)


@dataclass(eq=False)
class Checkpoints(HookBase):
    """Save a checkpoint every `period` iterations, and ``model_final`` and one more at the end.

    The final model has weights, config and classes only; checkpoints have the state of the training
    as well. One that cannot be written is logged and training continues; for the final model it is
    an error.

    Attributes:
        checkpointer: writes the files.
        period: in iterations; 0 saves at the end only.
        weights: returns the state dict of the final model.
    """

    checkpointer: Checkpointer
    period: int
    weights: Callable[[], dict[str, Tensor]]

    def after_step(self) -> None:
        """Save if it is due."""
        iteration = self.trainer.iter
        is_last = iteration + 1 >= self.trainer.max_iter
        is_due = is_last or (self.period > 0 and (iteration + 1) % self.period == 0)
        if is_due:
            self._require_finite(iteration)
        if is_last:
            self.save_final(iteration)
        if is_due:
            try:
                self.checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
            except CheckpointError as error:
                _LOGGER.error("%s Training continues.", error)

    def _require_finite(self, iteration: int) -> None:
        """Check the weights, since the loss shows what happened to them only one iteration later.

        Raises:
            NonFiniteLossError: on all processes, since they have the same weights.
        """
        parameters = list(self.checkpointer.model.parameters())
        finite = torch.stack([torch.isfinite(p.detach()).all() for p in parameters])
        if not bool(finite.all()):
            raise NonFiniteLossError(
                f"The weights are not finite after iteration {iteration}. A learning rate too high "
                "for the batch size is the usual cause: lower SOLVER.BASE_LR."
            )

    def save_final(self, iteration: int) -> None:
        """Write the final model."""
        content = {"model": self.weights(), "iteration": iteration}
        self.checkpointer.write("model_final.pth", content)


@dataclass(eq=False)
class AverageNorms(HookBase):
    """Average the statistics of batch norms, which every process collects, before they are used.

    Every process evaluates a part of the data and one process saves, so the models must be equal.
    """

    models: list[nn.Module]
    is_due: Callable[[int], bool]  # takes the number of finished iterations

    def after_step(self) -> None:
        """Average if it is due."""
        if self.is_due(self.trainer.iter + 1):
            for model in self.models:
                average_norms(model)


@torch.no_grad()
def average_norms(model: nn.Module) -> None:
    """Average the statistics of batch norms over all processes, and share every `TrainingState`."""
    for module in model.modules():
        if isinstance(module, TrainingState):
            module.share()
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    statistics = [x for m in norms for x in (m.running_mean, m.running_var) if x is not None]
    if comm.get_world_size() == 1 or not statistics:
        return
    means = reduce_mean(torch.cat(statistics))
    for local, mean in zip(statistics, means.split([len(x) for x in statistics]), strict=True):
        local.copy_(mean)


def precise_norms(
    cfg: CfgNode, models: list[nn.Module], build_loader: Callable[[CfgNode], Any]
) -> list[HookBase]:
    """Build the hooks of ``TEST.PRECISE_BN`` for several models, such as weights and EMA."""
    norms = [m for m in get_bn_modules(models[0]) if not isinstance(m, RunningNorm)]
    if not (cfg.TEST.PRECISE_BN.ENABLED and norms):
        return []
    plain = cfg.clone()
    plain.defrost()
    plain.DATALOADER.NUM_WORKERS = 0  # rarely used, so without processes
    period, count = cfg.TEST.EVAL_PERIOD, cfg.TEST.PRECISE_BN.NUM_ITER
    return [PreciseNorms(period, model, build_loader(plain), count) for model in models]


class PreciseNorms(hooks.PreciseBN):
    """Detectron2's hook, which leaves norms alone that normalize by running statistics."""

    def update_stats(self) -> None:
        """Compute the statistics of all other norms."""
        norms = [m for m in self._model.modules() if isinstance(m, RunningNorm) and m.training]
        for norm in norms:  # of which fvcore would average the variance without a correction
            norm.training = False
        super().update_stats()
        for norm in norms:
            norm.training = True


class ProgressBar(HookBase):
    """Bar with the remaining time, the loss and the last value of a metric, on terminals only."""

    def __init__(self, metric: str) -> None:
        self._bar: tqdm | None = None
        self.keys = {"loss": "total_loss", metric.rsplit("/", 1)[-1]: metric}

    def before_train(self) -> None:
        """Draw the bar."""
        counts = {"total": self.trainer.max_iter, "initial": self.trainer.start_iter}
        self._bar = progress_bar(desc="training", unit="it", **counts)

    def after_step(self) -> None:
        """Advance by one iteration."""
        latest = self.trainer.storage.latest()
        values = {name: f"{latest[k][0]:.2f}" for name, k in self.keys.items() if k in latest}
        if self._bar is not None:
            self._bar.set_postfix(values, refresh=False)
            self._bar.update()

    def after_train(self) -> None:
        """Leave the finished bar on the screen."""
        if self._bar is not None:
            self._bar.close()


class Writers(hooks.PeriodicWriter):
    """Write scalars periodically; the first writer, the console, after the first iteration, too."""

    _written = -1  # the last iteration the console has

    def before_train(self) -> None:
        """Begin or continue the runs of trackers."""
        for writer in self._writers:
            if isinstance(writer, TrackerWriter):
                writer.begin(resumed=self.trainer.start_iter > 0)

    def after_step(self) -> None:
        """Write if it is due."""
        super().after_step()
        iteration, last = self.trainer.iter, self.trainer.max_iter - 1
        is_written = (iteration + 1) % self._period == 0 or iteration == last
        if self._writers and iteration == self.trainer.start_iter and not is_written:
            self._writers[0].write()
            is_written = True
        if is_written:
            self._written = iteration

    def after_train(self) -> None:
        """Write what is new, and close; the console cannot write an iteration twice."""
        for index, writer in enumerate(self._writers):
            if index or self.trainer.storage.iter != self._written:
                writer.write()
            writer.close()
