"""Evaluation while training: the best model is kept, and training ends when none gets better."""

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import HookBase
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from ..data.mapper import DetectionMapper, read_image
from ..errors import CheckpointError, ConfigError
from ..modeling.decoder import Cascade
from ..utils.distributed import each_for_itself
from .checkpoint import ReportingCheckpointer

__all__ = [
    "BestModel",
    "EarlyStop",
    "Evaluation",
    "PredictionImages",
    "losses_without_learning",
    "validation_losses",
]

_LOGGER = logging.getLogger(__name__)


class EarlyStop(Exception):  # noqa: N818  (it is no error)
    """Training ends before its last iteration, because no evaluation found a better model.

    Attributes:
        iteration: the last one that was trained.
    """

    def __init__(self, iteration: int) -> None:
        """End after `iteration`."""
        super().__init__(iteration)
        self.iteration = iteration


class BestModel:
    """Keeps the weights of the best evaluation as ``model_best.pth``."""

    def __init__(
        self,
        metric: str,
        *,
        mode: str = "max",
        patience: int = 0,
        required: bool = True,
        checkpointer: ReportingCheckpointer,
        weights: Callable[[], dict[str, Tensor]],
    ) -> None:
        """Set the rule.

        Args:
            metric: name in the log, such as ``bbox/AP``.
            mode: "max" or "min".
            patience: evaluations without a better one that end training; 0 for never.
            required: False allows that an evaluation does not give the metric; it says so then.
            checkpointer: writes the file.
            weights: state dict of what was evaluated.
        """
        self.metric = metric
        self.sign = 1 if mode == "max" else -1
        self.patience = patience
        self.required = required
        self.checkpointer = checkpointer
        self.weights = weights
        self.value: float | None = None
        self.iteration = -1
        self.waited = 0

    def update(self, results: dict[str, float], iteration: int) -> None:
        """Compare, and write the weights if they are better than all before.

        All processes call it with the same results and agree on the outcome. A file that cannot be
        written is logged, and the next model as good is written instead.

        Raises:
            ConfigError: if the metric is not among the results, though `required`.
        """
        if self.metric not in results:
            message = (
                f"TEST.BEST.METRIC is {self.metric!r}, but the evaluation gives "
                f"{', '.join(sorted(results)) or 'nothing'}. Write one of them, or '' for none."
            )
            if self.required:
                raise ConfigError(message)
            _LOGGER.warning("%s No best model is kept.", message)
            return
        value = results[self.metric]
        if not math.isfinite(value) or (
            self.value is not None and self.sign * value <= self.sign * self.value
        ):
            self.waited += 1
        else:
            self.waited = 0
            content = {"model": self.weights(), "iteration": iteration, self.metric: value}
            if all(comm.all_gather(self._is_written(content))):
                self.value, self.iteration = value, iteration
        _LOGGER.info("Best %s so far: %s, iteration %d.", self.metric, self.value, self.iteration)

    def _is_written(self, content: dict[str, Any]) -> bool:
        try:
            self.checkpointer.write("model_best.pth", content)
        except CheckpointError as error:
            _LOGGER.error("The best model is not kept: %s", error)
            return False
        return True

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
            best: told about the results, on all processes.
        """
        self.period = period
        self.evaluate = evaluate
        self.best = best
        self.done = -1  # the last iteration that was evaluated

    def before_train(self) -> None:
        """Evaluate what was loaded, if that was missed.

        Raises:
            EarlyStop: if training had ended, or would have.
        """
        reached = self.trainer.start_iter - 1
        if reached >= 0 and self._is_turn(reached) and self.done < reached:
            self.trainer.storage.iter = reached
            self._run(reached)
            self.trainer.storage.iter = self.trainer.start_iter
        if reached >= 0:
            self._end_if_final(reached)

    def after_step(self) -> None:
        """Evaluate if it is time.

        Raises:
            EarlyStop: on all processes, if the best model has not improved for long enough.
        """
        iteration = self.trainer.iter
        if self._is_turn(iteration) and iteration + 1 < self.trainer.max_iter:
            self._run(iteration)
            self._end_if_final(iteration)

    def after_train(self) -> None:
        """Evaluate the end; not what an error has left, on one process perhaps."""
        last = self.trainer.max_iter - 1
        if self.trainer.iter > last and self.done < last:
            self._run(last)

    def _end_if_final(self, iteration: int) -> None:
        if self.best is not None and self.best.is_final:
            raise EarlyStop(iteration)

    def _is_turn(self, iteration: int) -> bool:
        return self.period > 0 and (iteration + 1) % self.period == 0

    def _run(self, iteration: int) -> None:
        results = flatten_results_dict(self.evaluate())
        numbers = {k: float(v) for k, v in results.items()}
        self.trainer.storage.put_scalars(**numbers, smoothing_hint=False)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # images at test size are larger; training needs the memory
        numbers = comm.all_gather(numbers)[0]  # only the main process has them
        if self.best is not None and numbers:
            self.best.update(numbers, iteration)
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


_DIFFERENT_WHEN_TRAINING = (_BatchNorm, _DropoutNd, nn.MultiheadAttention)


@contextmanager
def losses_without_learning(model: nn.Module) -> Iterator[None]:
    """Inside, the model gives losses as at inference.

    Norms use stored statistics, nothing is dropped, and a cascade refines no recollected proposals
    (SQR): losses are those of what inference runs, and compare with those of other trainings.
    """
    before = {module: module.training for module in model.modules()}
    cascades = [m for m in before if isinstance(m, Cascade) and m.recollects]
    model.train()
    for cascade in cascades:
        cascade.recollects = False
    for module in before:
        if isinstance(module, _DIFFERENT_WHEN_TRAINING):
            module.training = False
    try:
        # Detectron2's heads log what they do: not into the log of the training.
        with torch.no_grad(), each_for_itself(), EventStorage():
            yield
    finally:
        for cascade in cascades:
            cascade.recollects = True
        for module, training in before.items():
            module.training = training


def validation_losses(model: nn.Module, loader: Iterable[list[dict[str, Any]]]) -> dict[str, float]:
    """Mean losses over the images of all processes.

    Args:
        model: not wrapped for several processes: those need not have equally many images.
        loader: this process's batches, with ``instances``.

    Returns:
        Losses by name and ``total_loss``; empty on all processes but the main one.
    """
    sums: dict[str, float] = defaultdict(float)
    count = 0
    with losses_without_learning(model):
        for batch in loader:
            for name, value in model(batch).items():
                sums[name] += float(value) * len(batch)
            count += len(batch)
    gathered = comm.gather((dict(sums), count))
    if not comm.is_main_process():
        return {}
    images = sum(number for _, number in gathered)
    names = {name for losses, _ in gathered for name in losses}
    means = {n: sum(losses.get(n, 0.0) for losses, _ in gathered) / images for n in sorted(names)}
    return {"total_loss": sum(means.values()), **means}


_LOGGER = logging.getLogger(__name__)


class PredictionImages:
    """Draws ground truth and predictions of the same images every time."""

    def __init__(self, cfg: CfgNode, *, count: int = 4, threshold: float = 0.3) -> None:
        """Choose the images.

        Args:
            cfg: for the first of ``DATASETS.TEST``.
            count: how many, spread evenly over it.
            threshold: smallest score that is drawn.
        """
        self.cfg = cfg
        self.name = cfg.DATASETS.TEST[0]
        self.count = count
        self.threshold = threshold

    def __call__(self, model: nn.Module, storage: EventStorage) -> None:
        """Draw with `model` into `storage`, from where the writers take it."""
        try:
            from ..visualization.draw import picture_of, spread
        except ImportError:  # without the extra "viz"
            _LOGGER.warning('Images are not logged: pip install "dsrcnn[viz]", or LOG.IMAGES 0.')
            return
        records = DatasetCatalog.get(self.name)
        classes = MetadataCatalog.get(self.name).thing_classes
        mapper = DetectionMapper(self.cfg, is_train=False)
        training = model.training
        model.eval()
        for index in spread(len(records), self.count):
            with torch.no_grad():
                found = model([mapper(records[index])])[0]["instances"].to("cpu")
            image = read_image(dict(records[index]), "BGR")
            picture = picture_of(image, records[index], found, classes, self.threshold)
            storage.put_image(f"predictions/{index}", picture[..., ::-1].transpose(2, 0, 1).copy())
        model.train(training)
