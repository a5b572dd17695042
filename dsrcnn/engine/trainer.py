"""Detectron2's `DefaultTrainer` with this package's builders, loop, hooks and errors."""

import contextlib
import logging
import os
import weakref
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase, hooks
from detectron2.engine.train_loop import TrainerBase
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from torch import nn

from ..data import build_test_loader, build_train_loader
from ..data.build import build_validation_loader
from ..data.samplers import TrainingBatches
from ..errors import DsrcnnError, NonFiniteLossError, WeightsError
from ..evaluation import build_evaluator
from ..modeling.freeze import freeze_modules
from ..modeling.tta import TestTimeAugmentation
from ..solver import build_lr_scheduler, build_optimizer
from .checkpoint import ReportingCheckpointer
from .ema import AveragedWeights
from .eval_hooks import BestModel, EarlyStop, Evaluation, PredictionImages, validation_losses
from .hooks import AverageNorms, Checkpoints, ProgressBar, precise_norms
from .launch import for_all_processes
from .setup import final_recipe, warn_of_few_images
from .train_loop import TrainLoop, unwrapped
from .weight_io import remove_partial_files
from .writers import build_writers

__all__ = ["Trainer"]

_LOGGER = logging.getLogger(__name__)


class Trainer(DefaultTrainer):
    """Trains and evaluates any model of this package; each builder is one call.

    Attributes:
        average: the averaged weights, None without ``MODEL.EMA.ENABLED``.
    """

    def __init__(self, cfg: CfgNode) -> None:
        """Build model, optimizer, loader, checkpointer and hooks from `cfg`."""
        # Not what `DefaultTrainer` does there: it insists on CUDA for mixed precision and for
        # several processes, and starts the loader before a checkpoint could say where.
        TrainerBase.__init__(self)
        # Detectron2 logs a traceback for every exception; for our own the message says it all.
        logging.getLogger("detectron2.engine.train_loop").addFilter(_is_no_own_error)
        self._finished: int | None = None  # the last complete step of this run
        self.cfg = cfg = final_recipe(cfg)
        warn_of_few_images(cfg)
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        loader = self.build_train_loader(cfg)
        self.average: AveragedWeights | None = None
        if cfg.MODEL.EMA.ENABLED:
            ema = cfg.MODEL.EMA
            self.average = AveragedWeights(model, decay=ema.DECAY, warmup=ema.WARMUP)
        self._trainer: TrainLoop = TrainLoop.from_config(
            cfg, for_all_processes(model), loader, optimizer
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = ReportingCheckpointer(
            model, cfg.OUTPUT_DIR, trust=cfg.MODEL.TRUST_WEIGHTS, trainer=weakref.proxy(self)
        )
        if comm.is_main_process():
            remove_partial_files(cfg.OUTPUT_DIR)
        if self.average is not None:
            self.checkpointer.add_checkpointable("ema", self.average)
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> list[HookBase | None]:
        """The same on all processes, in the same order; writers only act on the main one."""
        cfg, model = self.cfg, unwrapped(self.model)
        models = [model] if self.average is None else [model, self.average.average.module]
        return [
            hooks.IterationTimer(),
            hooks.LRScheduler(),
            self._average_hook(),
            *precise_norms(cfg, models, self.build_train_loader),
            AverageNorms(models, self._leaves_the_process),
            # Before the evaluation: if that fails, the checkpoint is there.
            Checkpoints(self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD),
            Evaluation(cfg.TEST.EVAL_PERIOD, self._evaluate, self._best_model()),
            ProgressBar(cfg.TEST.BEST.METRIC or "bbox/AP"),
            hooks.PeriodicWriter(self.build_writers() if comm.is_main_process() else [], period=20),
        ]

    def _average_hook(self) -> HookBase | None:
        average = self.average
        if average is None:
            return None
        return hooks.CallbackHook(
            before_train=lambda _: average.start(), after_step=lambda _: average.update()
        )

    def _best_model(self) -> BestModel | None:
        node = self.cfg.TEST.BEST
        if not (node.METRIC and self.cfg.DATASETS.TEST):
            return None
        sets = self.cfg.DATASETS.TEST
        metric = node.METRIC
        if len(sets) > 1 and not metric.startswith(tuple(f"{name}/" for name in sets)):
            metric = f"{sets[0]}/{metric}"  # with several, the log names the set
        return BestModel(
            metric,
            required=node.METRIC != _DEFAULT_METRIC or node.PATIENCE > 0,
            mode=node.MODE,
            patience=node.PATIENCE,
            checkpointer=self.checkpointer,
            weights=self._evaluated_weights,
        )

    def _evaluated_weights(self) -> dict[str, torch.Tensor]:
        if self.average is not None:
            return self.average.weights()
        return unwrapped(self.model).state_dict()

    def _leaves_the_process(self, done: int) -> bool:
        """Whether weights are stored or evaluated after so many iterations."""
        periods = (self.cfg.SOLVER.CHECKPOINT_PERIOD, self.cfg.TEST.EVAL_PERIOD)
        return done >= self.max_iter or any(p > 0 and done % p == 0 for p in periods)

    def _evaluate(self) -> dict[str, Any]:
        """Evaluate the averaged weights where there are any, otherwise the weights."""
        cfg, model = self.cfg, unwrapped(self.model)
        average = self.average
        averaged = average.in_place_of_the_weights() if average else contextlib.nullcontext()
        with averaged:
            self._last_eval_results = self.test(cfg, model)
            results = dict(self._last_eval_results)
            for name in cfg.DATASETS.TEST if cfg.TEST.LOSS else ():
                losses = validation_losses(model, build_validation_loader(cfg, name))
                where = results.setdefault(name, {}) if len(cfg.DATASETS.TEST) > 1 else results
                where["validation"] = losses
            if cfg.LOG.IMAGES and cfg.DATASETS.TEST and comm.is_main_process():
                PredictionImages(cfg, count=cfg.LOG.IMAGES)(model, self.storage)
        return results

    def build_writers(self) -> list[EventWriter]:
        """See `dsrcnn.engine.writers.build_writers`."""
        return build_writers(self.cfg, self.max_iter)

    def run_step(self) -> None:
        """One step; remembers that it was finished."""
        super().run_step()
        self._finished = self.iter

    def train(self) -> dict[str, Any] | None:
        """Train from ``start_iter`` to the end.

        Raises:
            DsrcnnError: if something cannot be used, such as an image. The state reached is saved
                first; ``--resume`` goes on from it.
            NonFiniteLossError: if the loss diverges; the last checkpoint is untouched.
        """
        self._position_loader()
        try:
            return super().train()
        except EarlyStop as stop:
            return self._end_early(stop)
        except NonFiniteLossError as error:
            stopped: DsrcnnError = NonFiniteLossError(f"{error} {self._last_checkpoint()}")
            cause: DsrcnnError = error
        except DsrcnnError as error:
            stopped, cause = type(error)(f"{error} {self._save_reached()}"), error
        _LOGGER.error("%s", stopped)  # the command line prints it too, but not into the log
        raise stopped from cause

    def _position_loader(self) -> None:
        """Make the loader begin with the images of the first iteration of this run."""
        batches = getattr(self.data_loader, "batch_sampler", None)
        if isinstance(batches, TrainingBatches):
            batches.seed, batches.start = self._trainer.seed, self.start_iter
        elif self.start_iter:
            _LOGGER.warning("The loader is not this package's; its data start anew.")

    def _end_early(self, stop: EarlyStop) -> dict[str, Any]:
        self.checkpointer.save("model_final", iteration=stop.iteration)
        _LOGGER.info(
            "No better %s in %d evaluations: training ends after %d iterations. The best model is "
            "model_best.pth, the last one model_final.pth.",
            *(self.cfg.TEST.BEST.METRIC, self.cfg.TEST.BEST.PATIENCE, stop.iteration + 1),
        )
        return getattr(self, "_last_eval_results", {})

    def _save_reached(self) -> str:
        if self._finished is None:
            return self._last_checkpoint()
        self.iter = self._finished
        # Whichever process meets the error saves: model and optimizer are equal on all of them.
        self.checkpointer.save_to_disk = True
        name = f"model_{self.iter:07d}"
        try:
            self.checkpointer.save(name, iteration=self.iter)
        except DsrcnnError as error:
            return f"{error} {self._last_checkpoint()}"
        return (
            f"The model after {self.iter + 1} iterations is saved as {name}.pth in "
            f"{self.cfg.OUTPUT_DIR}; --resume goes on from there."
        )

    def _last_checkpoint(self) -> str:
        if self.checkpointer.has_checkpoint():
            return f"The last checkpoint is {self.checkpointer.get_checkpoint_file()}."
        return f"There is no checkpoint in {self.cfg.OUTPUT_DIR} yet."

    def state_dict(self) -> dict[str, Any]:
        """State for the checkpoint, with the loop's, which 0.6 forgets, and the seed."""
        own = {"_trainer": self._trainer.state_dict(), "seed": self._trainer.seed}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        if "_trainer" not in state_dict:
            raise WeightsError(
                "The checkpoint has no optimizer state, so training cannot go on from it. Leave "
                "out --resume and write MODEL.WEIGHTS to start from its weights."
            )
        super().load_state_dict(state_dict)
        self._trainer.load_state_dict(state_dict["_trainer"])
        seed = state_dict.get("seed", self._trainer.seed)
        if seed != self._trainer.seed:
            _LOGGER.info("Going on with the seed of the checkpoint, %d.", seed)
        self._trainer.seed = seed

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Detectron2's builder; ``MODEL.FREEZE`` is applied."""
        model = super().build_model(cfg)
        freeze_modules(model, cfg.MODEL.FREEZE)
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """See `dsrcnn.solver.build_optimizer`."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(
        cls, cfg: CfgNode, optimizer: torch.optim.Optimizer
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """See `dsrcnn.solver.build_lr_scheduler`."""
        return build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        """See `dsrcnn.data.build_train_loader`."""
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """See `dsrcnn.data.build_test_loader`."""
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """See `dsrcnn.evaluation.build_evaluator`."""
        return build_evaluator(cfg, dataset_name)

    @classmethod
    def test_with_TTA(  # noqa: N802  (the name Detectron2 projects use)
        cls, cfg: CfgNode, model: nn.Module
    ) -> dict[str, Any]:
        """Evaluate once more with test-time augmentation (``TEST.AUG``).

        Returns:
            The metrics with ``_TTA`` behind the task's name.
        """
        tta_cfg = cfg.clone()
        tta_cfg.defrost()
        tta_cfg.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, "tta")
        kind = TestTimeAugmentation if hasattr(model, "predict") else GeneralizedRCNNWithTTA
        augmented = kind(cfg, model)
        results = cls.test(tta_cfg, augmented)
        return {f"{task}_TTA": values for task, values in results.items()}


_DEFAULT_METRIC = "bbox/AP"


def _is_no_own_error(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], (DsrcnnError, EarlyStop)))
