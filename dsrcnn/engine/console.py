"""Console output of a run.

All messages are in ``log.txt`` of the output folder. The console shows those of this package, the
losses, and all warnings and errors; with ``LOG.LEVEL verbose`` it shows everything.
"""

import contextlib
import logging
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from detectron2.utils import comm
from tabulate import tabulate
from tqdm import tqdm

from dsrcnn_command import drop_output, escape_unprintable

FILE_ONLY = {"console": False}  # `extra` of a message that is printed in another way
_LOGGERS = ("dsrcnn", "detectron2", "fvcore")
_CONSOLE_LOGGERS = ("dsrcnn", "detectron2.utils.events")
_CONNECTIONS = re.compile("gloo|NCCL")  # in messages of torch
_RESET = "\x1b[0m"
_COLORS = {logging.WARNING: "\x1b[33m", logging.ERROR: "\x1b[31m", logging.CRITICAL: "\x1b[31m"}


def configure_logging(folder: str | Path, *, verbose: bool) -> None:
    """Set the handlers of the loggers of this package and of Detectron2, replacing earlier ones.

    The main process prints and writes ``log.txt``, the rest ``log.txt.rank<n>``; `folder` is
    created with the first message. With `verbose`, all messages are printed.
    """
    rank = comm.get_rank()
    path = Path(folder) / (f"log.txt.rank{rank}" if rank else "log.txt")
    file = _LogFile(path, delay=True, encoding="utf-8", errors="backslashreplace")
    escape_unprintable()
    text = "[%(asctime)s] %(name)s %(levelname)s: %(message)s"
    file.setFormatter(logging.Formatter(text, "%m/%d %H:%M:%S"))
    handlers: list[logging.Handler] = [file] if rank else [file, _Console(verbose)]
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        for handler in logger.handlers:
            handler.close()
        logger.handlers = handlers
        logger.setLevel(logging.DEBUG)
        logger.propagate = False


class _LogFile(logging.FileHandler):
    _failed = False  # whether it has been reported

    def _open(self) -> Any:
        Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
        return super()._open()

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  (of logging)
        """Say once that the file cannot be written, as on a full disk."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._failed:
            self._failed = True
            sys.stderr.write(f"{self.baseFilename} cannot be written: {error.strerror}.\n")

    def close(self) -> None:
        """Close the file; what is left to write may not fit on the disk."""
        with contextlib.suppress(OSError):
            super().close()


class _Console(logging.Handler):
    """Print on stdout, above progress bars; colors only for terminals.

    When stdout takes no more, as on a full disk, the rest is in ``log.txt`` only.
    """

    def __init__(self, verbose: bool) -> None:
        super().__init__()
        self.verbose = verbose
        name = " %(name)s" if verbose else ""
        self.setFormatter(logging.Formatter(f"[%(asctime)s{name}] %(message)s", "%H:%M:%S"))

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the message is printed."""
        if sys.stdout is None or not vars(record).get("console", True):
            return False
        if _is_of_lost_process(record):  # the message about the process itself is enough
            return self.verbose
        is_shown = record.levelno >= logging.INFO and record.name.startswith(_CONSOLE_LOGGERS)
        return self.verbose or is_shown or record.levelno >= logging.WARNING

    def emit(self, record: logging.LogRecord) -> None:
        """Print the message."""
        try:
            text = self.format(record)
            if record.levelno >= logging.WARNING:
                has_colors = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
                color = _COLORS.get(record.levelno, "") if has_colors else ""
                text = f"{color}{record.levelname}{_RESET if color else ''} {text}"
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()
        except OSError as error:
            drop_output(error)
        except Exception:
            self.handleError(record)


def _is_of_lost_process(record: logging.LogRecord) -> bool:
    """Whether it has the traceback of a broken connection to another process."""
    error = record.exc_info[1] if record.exc_info else None
    return isinstance(error, RuntimeError) and bool(_CONNECTIONS.search(str(error)))


def progress_bar(iterable: Iterable[Any] | None = None, **options: Any) -> tqdm:
    """Return tqdm's bar, disabled outside terminals and in all processes but the main one."""
    disable = None if comm.is_main_process() else True
    return tqdm(iterable, disable=disable, dynamic_ncols=True, **options)


def results_table(results: dict[str, dict[str, float]]) -> str:
    """Format the metrics of each task as tables: overall, then by class (``AP-<class>``)."""
    parts = []
    for task, metrics in results.items():
        overall = {name: value for name, value in metrics.items() if not name.startswith("AP-")}
        classes = [(k.removeprefix("AP-"), v) for k, v in metrics.items() if k not in overall]
        parts.append(tabulate([[task, *overall.values()]], ["", *overall], floatfmt=".2f"))
        columns = min(3, len(classes))
        rows = [sum(classes[i : i + columns], ()) for i in range(0, len(classes), columns or 1)]
        if rows:
            names = list(range(0, 2 * columns, 2))  # "007" is a name
            parts.append(
                tabulate(rows, ["class", "AP"] * columns, floatfmt=".2f", disable_numparse=names)
            )
    return "\n\n".join(parts)
