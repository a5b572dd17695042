"""Evaluation during training: the best model, early stopping, validation losses, pictures."""

import functools
import hashlib
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from ..data.build import load_records
from ..data.datasets.custom import require_class_names
from ..data.datasets.validate import to_xyxy
from ..data.images import read_image
from ..data.mapper import DetectionMapper
from ..data.samplers import seeded
from ..errors import CheckpointError, ConfigError
from ..utils.distributed import local_reductions
from ..utils.training import use_training_context
from ..visualization.draw import draw_comparison, evenly_spaced
from .checkpoint import Checkpointer

_LOGGER = logging.getLogger(__name__)
DEFAULT_METRIC = "bbox/AP"
_MIN_SCORE = 0.3  # of predictions that are drawn


class EarlyStop(Exception):  # noqa: N818  (it is no error)
    """End of a training run after `iteration`, since the evaluations have not improved."""

    def __init__(self, iteration: int) -> None:
        super().__init__(iteration)
        self.iteration = iteration


@dataclass(eq=False)
class BestModel:
    """Keeps the weights of the best evaluation in ``model_best.pth``.

    Less is better for losses and for the miss rate ``mMR``, more for other metrics.

    Attributes:
        metric: name in the log, such as ``bbox/AP``.
        patience: number of evaluations without improvement that end training; 0: never.
        required: whether an evaluation without the metric is an error or only a warning.
        checkpointer: writes the file.
        weights: returns the state dict that was evaluated.
        data: returns the fingerprint of the test data, which a resumed run compares.
    """

    metric: str
    _: KW_ONLY
    patience: int
    required: bool
    checkpointer: Checkpointer
    weights: Callable[[], dict[str, Tensor]]
    data: Callable[[], str] = field(default=lambda: "")
    value: float | None = field(default=None, init=False)
    iteration: int = field(default=-1, init=False)
    waited: int = field(default=0, init=False)
    fingerprint: str | None = field(default=None, init=False)  # of the data of these values

    @classmethod
    def from_config(
        cls, cfg: CfgNode, checkpointer: Checkpointer, weights: Callable[[], dict[str, Tensor]]
    ) -> "BestModel":
        """Build it from ``TEST.BEST``; with several test sets the metric is that of one of them."""
        node, sets = cfg.TEST.BEST, cfg.DATASETS.TEST
        metric, own = node.METRIC, sets[0]
        if len(sets) > 1:  # the log has the name of the set, too
            own = next((name for name in sets if metric.startswith(f"{name}/")), sets[0])
            metric = metric if metric.startswith(f"{own}/") else f"{own}/{metric}"
        return cls(
            metric,
            required=node.METRIC != DEFAULT_METRIC or node.PATIENCE > 0,
            patience=node.PATIENCE,
            checkpointer=checkpointer,
            weights=weights,
            data=functools.partial(data_fingerprint, own),
        )

    def update(self, results: dict[str, float], iteration: int) -> None:
        """Write the weights if the results are the best so far.

        All processes call it with the same results and agree on the outcome. If the file cannot be
        written, that is logged, and the next model that is at least as good is written instead.

        Raises:
            ConfigError: if the results lack the metric, though it is required.
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
        if self.fingerprint is None:  # while the data can be read: a checkpoint reads none
            self.fingerprint = self._shared_fingerprint()
        value = results[self.metric]
        sign = -1 if _less_is_better(self.metric) else 1
        is_better = self.value is None or sign * value > sign * self.value
        if not (math.isfinite(value) and is_better):
            self.waited += 1
        else:
            self.waited = 0
            content = {"model": self.weights(), "iteration": iteration, self.metric: value}
            if all(comm.all_gather(self._write(content))):
                self.value, self.iteration = value, iteration
        if self.value is not None:
            best = (self.metric, self.value, self.iteration)
            _LOGGER.info("Best %s so far: %.2f at iteration %d.", *best)

    def _shared_fingerprint(self) -> str:
        """Return that of the main process, so that all agree."""
        own = self.data() if comm.is_main_process() else ""
        return str(comm.all_gather(own)[0])

    def _write(self, content: dict[str, Any]) -> bool:
        try:
            self.checkpointer.write("model_best.pth", content)
        except CheckpointError as error:
            _LOGGER.error("The best model is not kept: %s", error)
            return False
        return True

    @property
    def is_final(self) -> bool:
        """Whether the patience is exhausted."""
        return 0 < self.patience <= self.waited

    def state_dict(self) -> dict[str, Any]:
        """Return the best value, its iteration, and the evaluations since."""
        names = ("metric", "value", "iteration", "waited")
        return {name: getattr(self, name) for name in (*names, "fingerprint")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the result of `state_dict`, unless it is about another metric or other data."""
        before = state_dict.get("metric", self.metric)
        if before != self.metric:
            _LOGGER.warning(
                "The best model was kept by %s and is now by %s: the next evaluation replaces it.",
                *(before, self.metric),
            )
            return
        known = state_dict.get("fingerprint")  # absent in earlier checkpoints
        if known is not None and known != self._shared_fingerprint():
            _LOGGER.warning(
                "The test data are others than those by which the best model was kept: the next "
                "evaluation replaces it."
            )
            return
        self.value, self.fingerprint = state_dict["value"], known
        self.iteration, self.waited = state_dict["iteration"], state_dict["waited"]


def data_fingerprint(name: str) -> str:
    """Hash images and labels of test set `name`; where its files are does not count."""
    lines = []
    for record in load_records(name, for_training=False):
        objects = [
            (int(a["category_id"]), *to_xyxy(a), int(a.get("iscrowd", 0)))
            for a in record["annotations"]
        ]
        lines.append(f"{Path(str(record['file_name'])).name} {objects}")
    return hashlib.sha256("\n".join(sorted(lines)).encode("utf-8", "surrogatepass")).hexdigest()


def _less_is_better(metric: str) -> bool:
    # By the last parts of the name: datasets and classes may be called "loss" and "validation".
    *groups, name = metric.split("/")
    return groups[-1:] == ["validation"] or name == "mMR"


@dataclass(eq=False)
class Evaluation(HookBase):
    """Evaluate every `period` iterations and after the last one.

    If a run is stopped between a checkpoint and its evaluation, the resumed run evaluates first.

    Attributes:
        period: in iterations; 0 evaluates at the end only.
        evaluate: called by all processes; returns results on the main one.
        best: updated with the results on all processes.
        done: the last iteration that was evaluated.
        is_end: whether the loaded checkpoint was the last one of a finished run.
    """

    period: int
    evaluate: Callable[[], dict[str, Any]]
    best: BestModel | None = None
    done: int = field(default=-1, init=False)
    is_end: bool = field(default=False, init=False)

    def before_train(self) -> None:
        """Evaluate the loaded model if its evaluation is missing.

        Raises:
            EarlyStop: if training had ended already.
        """
        last = self.trainer.start_iter - 1
        if last >= 0 and (self._is_due(last) or self.is_end) and self.done < last:
            self.trainer.storage.iter = last
            self._run(last)
            self.trainer.storage.iter = self.trainer.start_iter
        if last >= 0:
            self._stop_if_final(last)

    def after_step(self) -> None:
        """Evaluate if it is due.

        Raises:
            EarlyStop: on all processes, if the patience is exhausted.
        """
        iteration = self.trainer.iter
        if self._is_due(iteration) and iteration + 1 < self.trainer.max_iter:
            self._run(iteration)
            self._stop_if_final(iteration)

    def after_train(self) -> None:
        """Evaluate the final model, unless an error ended training, maybe on one process only."""
        last = self.trainer.max_iter - 1
        if self.trainer.iter > last and self.done < last:
            self._run(last)

    def _stop_if_final(self, iteration: int) -> None:
        if self.best is not None and self.best.is_final:
            raise EarlyStop(iteration)

    def _is_due(self, iteration: int) -> bool:
        return self.period > 0 and (iteration + 1) % self.period == 0

    def _run(self, iteration: int) -> None:
        results = flatten_results_dict(self.evaluate())
        numbers = {k: float(v) for k, v in results.items()}
        self.trainer.storage.put_scalars(**numbers, smoothing_hint=False)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # test images are larger, and training needs the memory
        numbers = comm.all_gather(numbers)[0]  # only the main process has them
        if self.best is not None and numbers:
            self.best.update(numbers, iteration)
        self.done = iteration

    def state_dict(self) -> dict[str, Any]:
        """Return the last evaluated iteration and the state of the best model."""
        best = self.best.state_dict() if self.best is not None else None
        # The last checkpoint is written before the evaluation at the end.
        is_end = self.trainer.iter + 1 >= self.trainer.max_iter
        return {"done": self.done, "best": best, "is_end": is_end}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the result of `state_dict`."""
        self.done = state_dict["done"]
        self.is_end = state_dict.get("is_end", False)  # absent in earlier checkpoints
        if self.best is not None and state_dict["best"] is not None:
            self.best.load_state_dict(state_dict["best"])


@contextmanager
def eval_loss_mode(model: nn.Module) -> Iterator[None]:
    """Let the model return the losses of the network that inference runs.

    Norms use stored statistics, dropout and stochastic depth are off, and no proposals are
    recollected (SQR), so losses compare with those of other training runs.
    """
    before = {module: module.training for module in model.modules()}
    model.train()
    for module in before:
        is_random = isinstance(module, (_DropoutNd, nn.MultiheadAttention))
        is_random = is_random or hasattr(module, "drop_prob")  # stochastic depth of timm
        if is_random or isinstance(module, _BatchNorm):
            module.training = False
    try:
        # Detectron2's heads write scalars, which do not belong into the log of the training.
        context = use_training_context(recollect=False)
        with torch.no_grad(), local_reductions(), context, EventStorage():
            yield
    finally:
        for module, training in before.items():
            module.training = training


@contextmanager
def _same_draws(model: nn.Module, seed: int) -> Iterator[None]:
    """Seed the draws of a model for a block, and restore their state afterwards."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with seeded(seed), torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(seed)
        yield


def validation_losses(model: nn.Module, loader: Iterable[list[dict[str, Any]]]) -> dict[str, float]:
    """Compute the mean losses over the images of all processes; `loader` has those of this one.

    The model must not be wrapped by `wrap_ddp`: processes may have different numbers of images.
    What a model draws, such as the sampled proposals of Faster R-CNN and the noise of denoising
    queries, is the same in every evaluation, and the state of the training's draws stays.

    Returns:
        Losses by name and ``total_loss``; empty on all processes but the main one.
    """
    sums: dict[str, float] = defaultdict(float)
    count = 0
    with eval_loss_mode(model):
        for number, batch in enumerate(loader):
            with _same_draws(model, number):
                losses = model(batch)
            for name, value in losses.items():
                sums[name] += float(value) * len(batch)
            count += len(batch)
    gathered = comm.gather((dict(sums), count))
    if not comm.is_main_process():
        return {}
    images = sum(number for _, number in gathered)
    if not images:  # no labels
        return {}
    names = {name for losses, _ in gathered for name in losses}
    means = {n: sum(losses.get(n, 0.0) for losses, _ in gathered) / images for n in sorted(names)}
    return {"total_loss": sum(means.values()), **means}


def draw_predictions(cfg: CfgNode, model: nn.Module, storage: EventStorage) -> None:
    """Draw ``LOG.IMAGES`` images of the first test set, always the same, for TensorBoard."""
    name = cfg.DATASETS.TEST[0]
    records, classes = load_records(name, for_training=False), require_class_names(name)
    mapper = DetectionMapper(cfg, is_train=False)
    training = model.training
    model.eval()
    for index in evenly_spaced(len(records), cfg.LOG.IMAGES):
        with torch.no_grad():
            detections = model([mapper(records[index])])[0]["instances"].to("cpu")
        image = read_image(dict(records[index]), "BGR")
        picture = draw_comparison(image, records[index], detections, classes, _MIN_SCORE)
        storage.put_image(f"predictions/{index}", picture[..., ::-1].transpose(2, 0, 1).copy())
    model.train(training)
