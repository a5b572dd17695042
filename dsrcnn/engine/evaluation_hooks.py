"""Evaluation while training: the best model is kept, and training ends when none gets better."""

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from torch import Tensor

from ..errors import ConfigError
from .checkpoint import ReportingCheckpointer

__all__ = ["BestModel", "EarlyStop", "Evaluation"]

_LOGGER = logging.getLogger(__name__)


class EarlyStop(Exception):  # noqa: N818  (it is no error)
    """Training ends before its last iteration, because no evaluation found a better model."""


class BestModel:
    """Keeps the weights of the best evaluation as ``model_best.pth``."""

    def __init__(
        self,
        metric: str,
        *,
        mode: str = "max",
        patience: int = 0,
        checkpointer: ReportingCheckpointer,
        weights: Callable[[], dict[str, Tensor]],
    ) -> None:
        """Set the rule.

        Args:
            metric: name in the log, such as ``bbox/AP``.
            mode: "max" or "min".
            patience: evaluations without a better one that end training; 0 for never.
            checkpointer: writes the file.
            weights: state dict of what was evaluated.
        """
        self.metric = metric
        self.sign = 1 if mode == "max" else -1
        self.patience = patience
        self.checkpointer = checkpointer
        self.weights = weights
        self.value: float | None = None
        self.iteration = -1
        self.waited = 0

    def update(self, results: dict[str, float], iteration: int) -> None:
        """Compare, and write the weights if they are better than all before.

        Raises:
            ConfigError: if the metric is not among the results.
        """
        if self.metric not in results:
            raise ConfigError(
                f"TEST.BEST.METRIC is {self.metric!r}, but the evaluation gives "
                f"{', '.join(sorted(results)) or 'nothing'}. Write one of them, or '' for none."
            )
        value = results[self.metric]
        if math.isfinite(value) and (
            self.value is None or self.sign * value > self.sign * self.value
        ):
            self.value, self.iteration, self.waited = value, iteration, 0
            content = {"model": self.weights(), "iteration": iteration, self.metric: value}
            self.checkpointer.write("model_best.pth", content)
        else:
            self.waited += 1
        _LOGGER.info("Best %s so far: %s, iteration %d.", self.metric, self.value, self.iteration)

    @property
    def is_final(self) -> bool:
        """Whether waiting for a better model is over."""
        return 0 < self.patience <= self.waited

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"value": self.value, "iteration": self.iteration, "waited": self.waited}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.value = state_dict["value"]
        self.iteration, self.waited = state_dict["iteration"], state_dict["waited"]


class Evaluation(HookBase):
    """Evaluates every `period` iterations and after the last one.

    An evaluation that was cut off after its checkpoint was written is made up for on resume.
    """

    def __init__(
        self, period: int, evaluate: Callable[[], dict[str, Any]], best: BestModel | None = None
    ) -> None:
        """Set period and function.

        Args:
            period: in iterations; 0 for the end only.
            evaluate: called by all processes; results on the main one.
            best: told about the results, on the main process.
        """
        self.period = period
        self.evaluate = evaluate
        self.best = best
        self.done = -1  # the last iteration that was evaluated

    def before_train(self) -> None:
        """Evaluate what was loaded, if that was missed."""
        reached = self.trainer.start_iter - 1
        if reached >= 0 and self._is_turn(reached) and self.done < reached:
            self.trainer.storage.iter = reached
            self._run(reached)
            self.trainer.storage.iter = self.trainer.start_iter

    def after_step(self) -> None:
        """Evaluate if it is time.

        Raises:
            EarlyStop: on all processes, if the best model has not improved for long enough.
        """
        iteration = self.trainer.iter
        if self._is_turn(iteration) and iteration + 1 < self.trainer.max_iter:
            self._run(iteration)
            is_final = self.best is not None and self.best.is_final
            if comm.all_gather(is_final)[0]:
                raise EarlyStop(iteration)

    def after_train(self) -> None:
        """Evaluate the end; not what an error has left."""
        last = self.trainer.max_iter - 1
        if self.trainer.iter >= last and self.done < last:
            self._run(last)

    def _is_turn(self, iteration: int) -> bool:
        return self.period > 0 and (iteration + 1) % self.period == 0

    def _run(self, iteration: int) -> None:
        results = flatten_results_dict(self.evaluate())
        numbers = {k: float(v) for k, v in results.items()}
        self.trainer.storage.put_scalars(**numbers, smoothing_hint=False)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # images at test size are larger; training needs the memory
        if self.best is not None and comm.is_main_process() and numbers:
            self.best.update(numbers, iteration)
        comm.synchronize()
        self.done = iteration

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        best = self.best.state_dict() if self.best is not None else None
        return {"done": self.done, "best": best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.done = state_dict["done"]
        if self.best is not None and state_dict["best"] is not None:
            self.best.load_state_dict(state_dict["best"])
