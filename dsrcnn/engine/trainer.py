"""Detectron2's `DefaultTrainer` with this package's builders, loop and errors."""

import logging
import os
import weakref
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from torch import nn

from ..data import build_test_loader, build_train_loader
from ..errors import DataError, DsrcnnError, NonFiniteLossError, WeightsError
from ..evaluation import build_evaluator
from ..modeling.test_time_augmentation import TestTimeAugmentation
from ..solver import build_optimizer
from .checkpoint import ReportingCheckpointer
from .hooks import ProgressBar
from .train_loop import TrainLoop

__all__ = ["Trainer"]

_LOGGER = logging.getLogger(__name__)


class Trainer(DefaultTrainer):
    """Trains and evaluates any model of this package; each builder is one call."""

    def __init__(self, cfg: CfgNode) -> None:
        """Build model, optimizer, loader, checkpointer and hooks from `cfg`."""
        self._finished: int | None = None  # the last complete step of this run
        # Detectron2's own mixed-precision loop insists on CUDA; ours replaces either of its loops.
        plain = cfg.clone()
        plain.defrost()
        plain.SOLVER.AMP.ENABLED = False
        super().__init__(plain)
        self.cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        self._trainer: TrainLoop = TrainLoop.take_over(self._trainer, self.cfg)
        self.checkpointer = ReportingCheckpointer(
            self._trainer.model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self)
        )
        for hook in self._hooks:  # made by the base class, with the checkpointer it had then
            if hasattr(hook, "checkpointer"):
                hook.checkpointer = self.checkpointer

    def build_hooks(self) -> list[HookBase]:
        """Detectron2's hooks and a progress bar before the writers."""
        hooks = super().build_hooks()
        if comm.is_main_process():
            hooks.insert(-1, ProgressBar())  # the writers end the list, on this process only
        return hooks

    def run_step(self) -> None:
        """One step; remembers that it was finished."""
        super().run_step()
        self._finished = self.iter

    def train(self) -> dict[str, Any] | None:
        """Train from ``start_iter`` to the end.

        Raises:
            DataError: if an image cannot be used. The state reached is saved first; ``--resume``
                goes on from it.
            NonFiniteLossError: if the loss diverges; the last checkpoint is untouched.
        """
        try:
            return super().train()
        except DataError as error:
            stopped: DsrcnnError = DataError(f"{error} {self._save_reached()}")
            cause: DsrcnnError = error
        except NonFiniteLossError as error:
            stopped, cause = NonFiniteLossError(f"{error} {self._last_checkpoint()}"), error
        _LOGGER.error("%s", stopped)  # the command line prints it too, but not into the log
        raise stopped from cause

    def _save_reached(self) -> str:
        if self._finished is None:
            return self._last_checkpoint()
        self.iter = self._finished
        # Whichever process meets the error saves: model and optimizer are equal on all of them.
        self.checkpointer.save_to_disk = True
        name = f"model_{self.iter:07d}"
        self.checkpointer.save(name, iteration=self.iter)
        return (
            f"The model after {self.iter + 1} iterations is saved as {name}.pth in "
            f"{self.cfg.OUTPUT_DIR}; --resume goes on from there."
        )

    def _last_checkpoint(self) -> str:
        if self.checkpointer.has_checkpoint():
            return f"The last checkpoint is {self.checkpointer.get_checkpoint_file()}."
        return f"There is no checkpoint in {self.cfg.OUTPUT_DIR} yet."

    def state_dict(self) -> dict[str, Any]:
        """State for the checkpoint, with the optimizer's, which 0.6 forgets."""
        return {**super().state_dict(), "_trainer": self._trainer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        super().load_state_dict(state_dict)
        if "_trainer" not in state_dict:
            raise WeightsError(
                "The checkpoint has no optimizer state, so training cannot go on from it. Leave "
                "out --resume and write MODEL.WEIGHTS to start from its weights."
            )
        self._trainer.load_state_dict(state_dict["_trainer"])

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """See `dsrcnn.solver.build_optimizer`."""
        return build_optimizer(cfg, model)

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
        augmented = TestTimeAugmentation(cfg, model)
        results = cls.test(tta_cfg, augmented)
        return {f"{task}_TTA": values for task, values in results.items()}
