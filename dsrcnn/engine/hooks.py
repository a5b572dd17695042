"""Hooks of the training loop, one concern each."""

import contextlib
import logging

from detectron2.engine import HookBase
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

__all__ = ["ProgressBar"]


class ProgressBar(HookBase):
    """A bar with the remaining time and the loss, on a terminal only.

    Log lines are written above the bar. Without a terminal the log alone tells, as in Detectron2.
    """

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._bar: tqdm | None = None

    def before_train(self) -> None:
        """Draw the bar, at the right place after a resume."""
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
            if "total_loss" in latest:
                self._bar.set_postfix(loss=f"{latest['total_loss'][0]:.2f}", refresh=False)
            self._bar.update()

    def after_train(self) -> None:
        """Leave the finished bar on the screen."""
        if self._bar is not None:
            self._bar.close()
        self._stack.close()
