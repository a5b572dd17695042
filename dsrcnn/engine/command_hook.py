"""Command that runs after every evaluation (``HOOKS.AFTER_EVAL``)."""

import contextlib
import logging
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from detectron2.engine import HookBase
from detectron2.utils import comm

_LOGGER = logging.getLogger(__name__)
_TAIL = 500  # characters of the output of a command that failed
_POLL = 0.2  # seconds between looks at a request to stop


class _StopRequestedError(Exception):
    """Training is asked to stop while the command runs."""


@dataclass(eq=False)
class CommandAfterEvaluation(HookBase):
    """Run a command on the main process after every evaluation; its failure never ends training.

    The words are arguments, and no shell reads them. In each of them ``{iteration}`` stands for the
    iteration that was evaluated and ``{output}`` for the output folder.

    Attributes:
        words: the program and its arguments.
        folder: output folder of the run.
        evaluated: returns the last iteration that was evaluated, -1 before the first.
        timeout: seconds until the command is ended; other processes wait that long.
        is_stopping: returns whether training is asked to stop, which ends the command, too.
        seen: iteration of the last evaluation that the command has run for.
    """

    words: Sequence[str]
    folder: str
    evaluated: Callable[[], int]
    timeout: float
    is_stopping: Callable[[], bool] = lambda: False
    seen: int = field(default=-1, init=False)

    def before_train(self) -> None:
        """Run the command if a resumed run has made up for an evaluation."""
        self.after_step()

    def after_step(self) -> None:
        """Run the command if there was an evaluation."""
        iteration = self.evaluated()
        if iteration != self.seen and not self.is_stopping():  # a resumed run makes up for it
            self.seen = iteration
            if comm.is_main_process():
                self._run(iteration)

    def after_train(self) -> None:
        """Run the command after the last evaluation."""
        self.after_step()

    def state_dict(self) -> dict[str, int]:
        """Return the last evaluation that was seen."""
        return {"seen": self.seen}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Restore the result of `state_dict`."""
        self.seen = state_dict["seen"]

    def _run(self, iteration: int) -> None:
        names = {"{iteration}": str(iteration), "{output}": str(Path(self.folder).resolve())}
        words = [_filled(word, names) for word in self.words]
        try:
            status, output = self._wait_for(words)
        except _StopRequestedError:
            _LOGGER.warning("HOOKS.AFTER_EVAL %s was ended: training is asked to stop.", words)
            return
        except (OSError, ValueError, subprocess.TimeoutExpired) as error:
            _LOGGER.warning("HOOKS.AFTER_EVAL %s failed: %s. Training continues.", words, error)
            return
        text = output.decode(errors="replace").strip()
        if status:
            _LOGGER.warning(
                "HOOKS.AFTER_EVAL %s ended with status %d: %s. Training continues.",
                *(words, status, text[-_TAIL:] or "no output"),
            )
        elif text:
            _LOGGER.info("HOOKS.AFTER_EVAL: %s", text)

    def _wait_for(self, words: list[str]) -> tuple[int, bytes]:
        """Run the command; return its status and output, or end it at the limit or a stop.

        Its output goes to a file: a pipe would stay open as long as something that the command
        leaves running in the background.
        """
        end = time.monotonic() + self.timeout
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that it can be ended with all that it has started
            )
            while True:
                try:
                    status = process.wait(timeout=_POLL)
                except subprocess.TimeoutExpired:
                    if self.is_stopping():
                        _kill_group(process)
                        raise _StopRequestedError from None
                    if time.monotonic() > end:
                        _kill_group(process)
                        raise subprocess.TimeoutExpired(words, self.timeout) from None
                else:
                    output.seek(0)
                    return status, output.read()


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _filled(word: str, names: dict[str, str]) -> str:
    for name, value in names.items():
        word = word.replace(name, value)
    return word
