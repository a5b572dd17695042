"""Processes that load images: their set-up, and what the training says when one has died."""

import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import cv2
from torch.utils.data import DataLoader, Dataset

from ..errors import DsrcnnError, LoaderError

_DEAD = re.compile(r"DataLoader worker \(pid\S* ([\d, ]+)\)")
_SECONDS_TO_END = 30.0
_LOADER = "torch/utils/data/dataloader.py"
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class ImageLoader(DataLoader):
    """Loader whose workers start fast, outlive signals and keep OpenCV single-threaded.

    Workers are forked on Linux. The processes of ``--num-gpus`` are spawned and would spawn theirs,
    too, which takes seconds for the imports. The process that trains finishes its step or its image
    after a signal, and ends its workers. Terminals and schedulers send signals to all processes of
    a job.
    """

    def __init__(self, dataset: Dataset, *, num_workers: int, **options: Any) -> None:
        """See `torch.utils.data.DataLoader`.

        Args:
            dataset: if workers are not forked, of a class of this package, which they import first:
                it lets Detectron2 be imported beside new versions of Pillow.
            num_workers: number of processes; 0 loads in this one.
            options: other options than ``worker_init_fn`` and ``multiprocessing_context``.
        """
        forks = num_workers > 0 and sys.platform == "linux"
        super().__init__(
            dataset,
            num_workers=num_workers,
            worker_init_fn=set_up_worker,
            multiprocessing_context="fork" if forks else None,
            **options,
        )

    def __iter__(self) -> Any:
        """Start the workers, with signals held back until `set_up_worker` handles them.

        This is so for forks. Where workers are spawned, Python starts a process of its own first
        and lets the signals through again.
        """
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        try:
            signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # a handler may raise here
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def set_up_worker(worker: int) -> None:
    """Handle signals in a worker of `ImageLoader`, and keep OpenCV single-threaded."""
    del worker
    cv2.setNumThreads(0)  # 1 would wait for threads of the parent, which a fork does not copy
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # as on macOS
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        return
    # SIGTERM stays blocked, in all threads.
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    """End this process at once if `parent` sends SIGTERM, after a while if others do."""
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        timer = threading.Timer(_SECONDS_TO_END, os._exit, [0])
        timer.daemon = True
        timer.start()
    os._exit(0)


@contextmanager
def explain_dead_workers() -> Iterator[None]:
    """Turn the errors that follow the death of a loader worker into a `LoaderError`.

    Raises:
        LoaderError: if a worker has died.
    """
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:
        if not is_of_dead_worker(error):
            raise
        found = _DEAD.search(str(error)) or _DEAD.search(str(error.__context__))
        process = f" ({found[1]})" if found else ""
        raise LoaderError(
            f"A process that loads images{process} has died, most often because main memory or "
            "/dev/shm ran out. Lower DATALOADER.NUM_WORKERS; with 0 no such process is needed."
        ) from error


def is_of_dead_worker(error: BaseException | None) -> bool:
    """Whether an error comes from a dead loader worker: torch's own or a broken connection to it.

    Torch raises its own from a signal handler, so anywhere in the program.
    """
    if isinstance(error, DsrcnnError) or error is None:
        return False
    if isinstance(error, (ConnectionError, EOFError)):
        frames = traceback.extract_tb(error.__traceback__)
        return any(frame.filename.endswith(_LOADER) for frame in frames)
    return isinstance(error, RuntimeError) and bool(_DEAD.search(str(error)))
