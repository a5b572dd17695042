"""Detectron2's `DefaultTrainer` with this package's builders, loop, hooks and errors."""

import contextlib
import logging
import os
import shlex
import signal
import weakref
from collections.abc import Sequence, Sized
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultTrainer, HookBase, hooks
from detectron2.engine.train_loop import TrainerBase
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset
from detectron2.modeling import GeneralizedRCNNWithTTA, build_model
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..data import build_test_loader, build_train_loader
from ..data.build import build_validation_loader
from ..data.samplers import TrainingBatches
from ..data.workers import explain_dead_workers, is_of_dead_worker
from ..errors import (
    CheckpointError,
    DsrcnnError,
    LoaderError,
    NonFiniteLossError,
    TrainingInterrupted,
    WeightsError,
)
from ..evaluation import build_evaluator
from ..modeling.freeze import freeze_modules, use_stored_statistics
from ..modeling.meta_arch.base import SparseDetector
from ..modeling.tta import TestTimeAugmentation
from ..solver import build_lr_scheduler, build_optimizer
from ..utils.references import weak_method
from .checkpoint import Checkpointer
from .command_hook import CommandAfterEvaluation
from .console import FILE_ONLY, progress_bar, results_table
from .ema import AveragedWeights
from .eval_hooks import (
    DEFAULT_METRIC,
    BestModel,
    EarlyStop,
    Evaluation,
    draw_predictions,
    validation_losses,
)
from .hooks import AverageNorms, Checkpoints, ProgressBar, Writers, precise_norms
from .interrupt import StopSignals
from .memory import explain_memory, explain_test_memory
from .processes import wrap_ddp
from .setup import device_name, resolve_solver
from .train_loop import TrainLoop, unwrapped
from .weight_io import remove_partial_files
from .writers import build_writers

_LOGGER = logging.getLogger(__name__)
_MAX_NAMES = 8  # of classes in the summary


class Trainer(DefaultTrainer):
    """Trainer and evaluator for any model of this package.

    Attributes:
        average: the averaged weights; None without ``MODEL.EMA.ENABLED``.
        best: keeps the best model; None without ``TEST.BEST.METRIC`` or test data.
    """

    build_optimizer = staticmethod(build_optimizer)
    build_lr_scheduler = staticmethod(build_lr_scheduler)
    build_train_loader = staticmethod(build_train_loader)
    build_test_loader = staticmethod(build_test_loader)
    build_evaluator = staticmethod(build_evaluator)

    def __init__(self, cfg: CfgNode) -> None:
        # `DefaultTrainer.__init__` requires CUDA for mixed precision and several processes, and
        # starts the loader before a checkpoint can set its position.
        TrainerBase.__init__(self)
        # Detectron2 logs a traceback of every exception; messages of ours are enough.
        logging.getLogger("detectron2.engine.train_loop").addFilter(_is_unexpected)
        self._finished: int | None = None  # the last complete step of this run
        self._signals = StopSignals()
        self._last_eval_results: dict[str, Any] = {}
        self.cfg = cfg = resolve_solver(cfg)
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        loader = self.build_train_loader(cfg)
        self.average: AveragedWeights | None = None
        if cfg.MODEL.EMA.ENABLED:
            self.average = AveragedWeights(model, decay=cfg.MODEL.EMA.DECAY)
        self._trainer: TrainLoop = TrainLoop.from_config(cfg, wrap_ddp(model), loader, optimizer)
        self._trainer.stop_requested = self._signals.is_requested
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = Checkpointer(
            model,
            cfg.OUTPUT_DIR,
            trust=cfg.MODEL.TRUST_WEIGHTS,
            kept=cfg.SOLVER.CHECKPOINTS_KEPT,
            description={"config": cfg.dump(), "classes": _class_names(cfg)},
            trainer=weakref.proxy(self),
        )
        if comm.is_main_process():
            remove_partial_files(cfg.OUTPUT_DIR)
        if self.average is not None:
            self.checkpointer.add_checkpointable("ema", self.average)
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.best = None
        if cfg.TEST.BEST.METRIC and cfg.DATASETS.TEST:
            weights = weak_method(self._best_weights)
            self.best = BestModel.from_config(cfg, self.checkpointer, weights)
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> list[HookBase | None]:
        """Build the hooks, which are the same on all processes; only the main one writes."""
        cfg, model = self.cfg, unwrapped(self.model)
        models = [model] if self.average is None else [model, self.average.average.module]
        evaluation = Evaluation(cfg.TEST.EVAL_PERIOD, weak_method(self._evaluate), self.best)
        best = weak_method(self._best_weights)
        return [
            hooks.IterationTimer(),
            hooks.LRScheduler(),
            self._build_average_hook(),
            *precise_norms(cfg, models, self.build_train_loader),
            AverageNorms(models, weak_method(self._is_saved_or_evaluated)),
            # Before the evaluation, so that a checkpoint exists if that fails.
            Checkpoints(self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD, best),
            evaluation,
            self._build_command_hook(evaluation),
            ProgressBar(cfg.TEST.BEST.METRIC or DEFAULT_METRIC),
            Writers(self.build_writers() if comm.is_main_process() else [], cfg.LOG.PERIOD or 20),
        ]

    def _build_average_hook(self) -> HookBase | None:
        average = self.average
        if average is None:
            return None
        start, update = lambda _: average.start(), lambda _: average.update()
        return hooks.CallbackHook(before_train=start, after_step=update)

    def _build_command_hook(self, evaluation: Evaluation) -> HookBase | None:
        cfg = self.cfg
        if not cfg.HOOKS.AFTER_EVAL:
            return None
        # Half of the time that other processes wait at most.
        words, timeout = list(cfg.HOOKS.AFTER_EVAL), cfg.DISTRIBUTED_TIMEOUT / 2
        return CommandAfterEvaluation(
            words,
            cfg.OUTPUT_DIR,
            lambda: evaluation.done,
            timeout,
            self._signals.is_requested,
        )

    def _best_weights(self) -> dict[str, Tensor]:
        """Return the state dict to evaluate and to keep: of the average if there is one."""
        return self.average.weights() if self.average else unwrapped(self.model).state_dict()

    def _is_written(self, done: int) -> bool:
        """Whether scalars are written after `done` iterations: as `Writers` does."""
        return done == self.start_iter + 1 or done % (self.cfg.LOG.PERIOD or 20) == 0

    def _is_saved_or_evaluated(self, done: int) -> bool:
        """Whether weights are saved or evaluated after `done` iterations, or at a stop."""
        periods = (self.cfg.SOLVER.CHECKPOINT_PERIOD, self.cfg.TEST.EVAL_PERIOD)
        due = done >= self.max_iter or any(p > 0 and done % p == 0 for p in periods)
        return due or self._trainer.stops

    def _evaluate(self) -> dict[str, Any]:
        """Evaluate the averaged weights if there are any, otherwise the weights."""
        cfg, model = self.cfg, unwrapped(self.model)
        average = self.average
        swapped = average.swapped_in() if average else contextlib.nullcontext()
        with swapped, self._signals.interrupting(model):
            self._last_eval_results = self.test(cfg, model)
            results = dict(self._last_eval_results)
            for name in cfg.DATASETS.TEST if cfg.TEST.LOSS else ():
                losses = validation_losses(model, build_validation_loader(cfg, name))
                node = results.setdefault(name, {}) if len(cfg.DATASETS.TEST) > 1 else results
                node["validation"] = losses
            if cfg.LOG.IMAGES and cfg.DATASETS.TEST and comm.is_main_process():
                draw_predictions(cfg, model, self.storage)
        return results

    def resume_or_load(self, resume: bool = True) -> None:
        """Load the newest checkpoint of ``OUTPUT_DIR`` with `resume`, or else ``MODEL.WEIGHTS``.

        Raises:
            WeightsError: if the file is missing or damaged, or does not fit.
        """
        self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        if self.checkpointer.resumed is not None:
            self.start_iter = self.iter + 1
            if self.start_iter >= self.max_iter:
                _LOGGER.warning(
                    "The run has %d iterations, SOLVER.MAX_ITER is %d: nothing is left to train.",
                    *(self.start_iter, self.max_iter),
                )

    def build_writers(self) -> list[EventWriter]:
        """See `dsrcnn.engine.writers.build_writers`."""
        return build_writers(self.cfg, self.max_iter)

    def run_step(self) -> None:
        """Run one step."""
        super().run_step()
        self._finished = self.iter

    def after_step(self) -> None:
        """Run the hooks, and stop if a process has received a signal.

        Raises:
            TrainingInterrupted: on all processes.
            NonFiniteLossError: if the losses are read in this step and are infinite or NaN.
        """
        if self._is_written(done := self.iter + 1) or self._is_saved_or_evaluated(done):
            self._trainer.read_losses()
        super().after_step()
        if self._trainer.stops:
            raise TrainingInterrupted(self._signals.received or signal.SIGTERM)

    def train(self) -> dict[str, Any]:
        """Train from ``start_iter`` to the end.

        Returns:
            The results of the last evaluation; empty without one.

        Raises:
            DsrcnnError: if something is unusable, such as an image. The state is saved first, and
                ``--resume`` continues from it.
            TrainingInterrupted: after Ctrl-C or SIGTERM, with the state saved as well.
            NonFiniteLossError: if the loss diverges; the last checkpoint is untouched.
        """
        self._set_loader_position()
        if comm.is_main_process():
            (Path(self.cfg.OUTPUT_DIR) / "model.txt").write_text(f"{unwrapped(self.model)}\n")
            _LOGGER.debug("Model:\n%s", str(unwrapped(self.model)))  # a record must not keep it
        _LOGGER.info("Training\n%s", self._summary())
        with self._signals.handled():
            done = self._train()
        _LOGGER.info("%s", self._conclusion(done))
        return self._last_eval_results

    def _train(self) -> int:
        """Train, and save the state if something ends it; return the number of iterations done."""
        done = max(self.start_iter, self.max_iter)
        try:
            with (
                explain_dead_workers(),
                explain_memory(lambda: f"at iteration {self.iter}. Use smaller images."),
            ):
                super().train()
        except TrainingInterrupted as stop:
            raise self._interrupted(stop) from None
        except EarlyStop as stop:
            self.iter = stop.iteration  # a run that had ended is one iteration ahead
            next(h for h in self._hooks if isinstance(h, Checkpoints)).save_final(stop.iteration)
            self.checkpointer.save(f"model_{stop.iteration:07d}", iteration=stop.iteration)
            node = self.cfg.TEST.BEST
            _LOGGER.info(
                "No better %s in %d evaluations: training ends early.", node.METRIC, node.PATIENCE
            )
            done = stop.iteration + 1
        except DsrcnnError as error:
            if isinstance(error, LoaderError) and (number := self._signals.wait()) is not None:
                # Workers of another loader die of the signal that this process receives, too.
                raise self._interrupted(TrainingInterrupted(number)) from None
            if isinstance(error, (CheckpointError, NonFiniteLossError)):  # cannot be saved
                diverged = isinstance(error, NonFiniteLossError)
                advice = self.checkpointer.describe_last(diverged=diverged)
            else:
                advice = self._save_finished()
            stopped = type(error)(f"{error} {advice}")
            _LOGGER.error("%s", stopped, extra=FILE_ONLY)  # the command line prints it
            raise stopped from error
        except RuntimeError as error:
            if self._signals.received is None or comm.get_world_size() == 1:
                raise
            # The connection to a process that has stopped, as this one would have a little later.
            raise self._interrupted(TrainingInterrupted(self._signals.received)) from error
        return done

    def _interrupted(self, stop: TrainingInterrupted) -> TrainingInterrupted:
        """Save the state, and add to the message where it is."""
        saved = self._save_finished() if comm.is_main_process() else ""
        return TrainingInterrupted(stop.signal, f"{stop} {saved}")

    def _set_loader_position(self) -> None:
        """Let the loader begin with the images of the first iteration of this run."""
        loader = self.data_loader
        batches = loader.batch_sampler if isinstance(loader, DataLoader) else None
        if isinstance(batches, TrainingBatches):
            batches.seed, batches.start = self._trainer.seed, self.start_iter
        elif self.start_iter:
            _LOGGER.warning("The loader is not this package's; it starts from the beginning.")

    def _summary(self) -> str:
        """Describe the run in a few lines."""
        cfg, solver, model = self.cfg, self.cfg.SOLVER, unwrapped(self.model)
        classes = _class_names(cfg)
        names = ", ".join(classes[:_MAX_NAMES]) + (", ..." if len(classes) > _MAX_NAMES else "")
        dataset = self.data_loader.dataset if isinstance(self.data_loader, DataLoader) else None
        images = len(dataset) if isinstance(dataset, Sized) else 0
        count, batch = self.max_iter, solver.IMS_PER_BATCH
        epochs = f" ({count * batch / images:.1f} epochs)" if images else ""
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
        total = sum(p.numel() for p in model.parameters()) / 1e6
        sets, period = cfg.DATASETS.TEST, cfg.TEST.EVAL_PERIOD
        every = f", every {period} iterations" if sets and period else ""
        weights = cfg.MODEL.WEIGHTS or "random weights"
        precision = str(self._trainer.precision).removeprefix("torch.")
        if self.start_iter:
            weights = f"iteration {self.start_iter} of an earlier run"
        rows = {
            "data": f"{', '.join(cfg.DATASETS.TRAIN)}, {images} images",
            "classes": f"{len(classes)}: {names}",
            "model": f"{cfg.MODEL.META_ARCHITECTURE}, {cfg.MODEL.BACKBONE.NAME}, from {weights}",
            "parameters": f"{total:.1f} M, {trained:.1f} M of them trained",
            "schedule": f"{count} iterations of {batch} images{epochs}, "
            f"{solver.OPTIMIZER}, learning rate {solver.BASE_LR:g}",
            "evaluation": f"{', '.join(sets) or 'none'}{every}",
            "device": f"{device_name(cfg)}, {precision}, processes: {comm.get_world_size()}",
            "output": cfg.OUTPUT_DIR,
        }
        return "\n".join(f"  {name:<12}{text}" for name, text in rows.items())

    def _conclusion(self, done: int) -> str:
        """Name the result, the best model and the command that draws its predictions."""
        folder, best, latest = Path(self.cfg.OUTPUT_DIR), self.best, self.storage.latest()
        metric = best.metric if best is not None else DEFAULT_METRIC
        result = f": {metric} {latest[metric][0]:.2f}" if metric in latest else ""
        kept, file = "Model", "model_final.pth"
        if best is not None and best.value is not None:
            kept, file = f"Best {best.value:.2f} at iteration {best.iteration}", "model_best.pth"
        text = f"Finished {done} iterations{result}. {kept}: {folder / file}."
        if self.cfg.DATASETS.TEST:
            text += f" Look at it: dsrcnn draw predictions {shlex.quote(str(folder))}"
        return text

    def _save_finished(self) -> str:
        """Save the state after the last complete step; returns a message about it."""
        if self._finished is None or self._trainer.in_step:
            return self.checkpointer.describe_last()
        self.iter = self._finished
        # Any process may meet the error and save: model and optimizer are equal on all of them.
        self.checkpointer.save_to_disk = True
        name = f"model_{self.iter:07d}"
        try:
            self._trainer.read_losses()
            self.checkpointer.save(name, iteration=self.iter)
        except DsrcnnError as error:
            return f"{error} {self.checkpointer.describe_last()}"
        return (
            f"The model after {self.iter + 1} iterations is saved as {name}.pth in "
            f"{self.cfg.OUTPUT_DIR}; --resume continues from there."
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the state of hooks, loop and seed."""
        # Detectron2 0.6 leaves the loop out.
        loop = {"_trainer": self._trainer.state_dict(), "seed": self._trainer.seed}
        return {**super().state_dict(), **loop}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the result of `state_dict`.

        Raises:
            WeightsError: if it has no optimizer state.
        """
        if "_trainer" not in state_dict:
            raise WeightsError(
                "The checkpoint has no optimizer state, so training cannot continue from it. Leave "
                "out --resume and write MODEL.WEIGHTS to start from its weights."
            )
        iteration, seed = state_dict.get("iteration"), state_dict.get("seed", self._trainer.seed)
        for name, value in (("iteration", iteration), ("seed", seed)):
            if type(value) is not int or value < 0:
                raise WeightsError(
                    f"The checkpoint has the {name} {value!r}; an integer from 0 on is expected. "
                    "Leave out --resume."
                )
        super().load_state_dict(state_dict)
        self._trainer.load_state_dict(state_dict["_trainer"])
        if seed != self._trainer.seed:
            _LOGGER.info("Using the seed of the checkpoint, %d.", seed)
        self._trainer.seed = seed

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Build the model and apply ``MODEL.FREEZE`` and ``MODEL.BACKBONE.NORM_EVAL``."""
        model = build_model(cfg)
        if cfg.MODEL.BACKBONE.NORM_EVAL:
            use_stored_statistics(model)
        freeze_modules(model, cfg.MODEL.FREEZE)
        return model

    @classmethod
    def test(
        cls, cfg: CfgNode, model: nn.Module, evaluators: Sequence[DatasetEvaluator] | None = None
    ) -> dict[str, Any]:
        """Evaluate on all of ``DATASETS.TEST`` and print a table for each.

        `evaluators` has one entry per dataset; None builds them.

        Returns:
            The metrics by task, or by dataset and task if there are several datasets.
        """
        results: dict[str, Any] = {}
        for index, name in enumerate(cfg.DATASETS.TEST):
            evaluator = evaluators[index] if evaluators else cls.build_evaluator(cfg, name)
            loader = cls.build_test_loader(cfg, name)
            bar = progress_bar(loader, desc=name, unit="batch", leave=False)
            with bar, explain_dead_workers(), explain_test_memory(cfg, name):
                results[name] = inference_on_dataset(model, bar, evaluator)
            if results[name]:
                _LOGGER.info("Results on %s\n%s", name, results_table(results[name]))
        return next(iter(results.values())) if len(results) == 1 else results

    @classmethod
    def test_with_TTA(  # noqa: N802  (the name Detectron2 projects use)
        cls, cfg: CfgNode, model: nn.Module
    ) -> dict[str, Any]:
        """Evaluate with test-time augmentation (``TEST.AUG``).

        Returns:
            The metrics with ``_TTA`` behind the task's name.
        """
        tta_cfg = cfg.clone()
        tta_cfg.defrost()
        tta_cfg.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, "tta")
        is_sparse = isinstance(model, SparseDetector)
        augmented = (TestTimeAugmentation if is_sparse else GeneralizedRCNNWithTTA)(cfg, model)
        _LOGGER.info("Evaluating with test-time augmentation.")
        results = cls.test(tta_cfg, augmented)
        return {f"{task}_TTA": values for task, values in results.items()}


def _class_names(cfg: CfgNode) -> list[str]:
    return list(MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).get("thing_classes", []))


def _is_unexpected(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    return not (isinstance(error, (DsrcnnError, EarlyStop)) or is_of_dead_worker(error))
