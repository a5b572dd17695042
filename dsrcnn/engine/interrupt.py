"""Ctrl-C and SIGTERM during training: the state reached is saved before the process ends."""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from torch import nn

from ..errors import TrainingInterrupted
from .console import FILE_ONLY

_LOGGER = logging.getLogger(__name__)
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_REPEAT = 1.0  # seconds in which a signal is the same one, sent to the parent process as well


@contextmanager
def handled_by(
    handler: Callable[[int, FrameType | None], object], signals: Iterable[int]
) -> Iterator[None]:
    """Handle signals in a block; only the main thread can, in others nothing changes.

    SIGHUP stays ignored where it is, so that ``nohup`` keeps its promise.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        number: signal.signal(number, handler)
        for number in signals
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


class StopSignals:
    """Turns the first signal into a request to stop; a second one ends the process at once.

    Attributes:
        received: the signal; None without one.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._time = 0.0
        self._process = os.getpid()

    def is_requested(self) -> bool:
        """Return whether a signal was received."""
        return self.received is not None

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Receive signals inside; only the main thread can."""
        with handled_by(self._receive, _SIGNALS):
            yield

    @contextmanager
    def interrupting(self, model: nn.Module) -> Iterator[None]:
        """Raise `TrainingInterrupted` before the next batch of `model` inside, as in an evaluation.

        Not from the signal's handler, which may run in the middle of a fork, a finalizer or a
        handler of `logging`, where exceptions are printed and dropped. Errors after a signal are
        taken for its consequence, such as a lost connection to another process that has stopped.
        """
        hook = model.register_forward_pre_hook(lambda *_: self._raise_if_requested())
        try:
            self._raise_if_requested()
            yield
        except Exception as error:
            if self.received is not None and not isinstance(error, TrainingInterrupted):
                _LOGGER.warning("Error after the signal:", exc_info=True, extra=FILE_ONLY)
                raise TrainingInterrupted(self.received) from error
            raise
        finally:
            hook.remove()

    def _raise_if_requested(self) -> None:
        if self.received is not None:
            raise TrainingInterrupted(self.received)

    def wait(self, seconds: float = 0.5) -> int | None:
        """Return the signal that is received within some time, None without one."""
        end = time.monotonic() + seconds
        while self.received is None and time.monotonic() < end:
            time.sleep(0.01)
        return self.received

    def _receive(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._process:  # a fork, which its parent ends
            return
        if self.received is not None:
            if time.monotonic() - self._time > _REPEAT:
                raise KeyboardInterrupt
            return
        self.received, self._time = number, time.monotonic()


@contextmanager
def forwarded_signals(processes: Iterable[int]) -> Iterator[list[int]]:
    """Send signals on to processes; the list has those that arrived."""
    received: list[int] = []

    def forward(number: int, _: FrameType | None) -> None:
        received.append(number)
        for process in processes:
            with suppress(ProcessLookupError):
                os.kill(process, number)

    is_main = threading.current_thread() is threading.main_thread()
    before = {n: signal.signal(n, forward) for n in _SIGNALS} if is_main else {}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
