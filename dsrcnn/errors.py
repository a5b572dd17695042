"""Errors for invalid input.

Every message names the key or file, its value, the expected value and the next action. The command
line prints the message without a traceback.
"""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from signal import Signals

# Faults of disks and paths, not of the program.
_SYSTEM_ERRORS = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO),
    *(errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ENOENT, errno.EEXIST, errno.ELOOP),
    *(errno.EMFILE, errno.ENFILE, errno.ESTALE),
}


class DsrcnnError(Exception):
    """Base of this package's errors: invalid input, not a bug."""

    def __init__(self, message: str) -> None:
        # A loader worker's exception arrives with the worker's traceback as its message.
        super().__init__(message_from_traceback(message) or message)


class ConfigError(DsrcnnError, ValueError):
    """Invalid config key or value."""


class DataError(DsrcnnError, ValueError):
    """Unusable dataset, annotation or image."""


class WeightsError(DsrcnnError, RuntimeError):
    """Weight file that is missing or does not fit the model."""


class UnreadableWeightsError(WeightsError):
    """Damaged weight file, such as a truncated one."""


class CheckpointError(DsrcnnError, OSError):
    """Checkpoint that could not be written; earlier ones are untouched."""


class MissingPackageError(DsrcnnError, ImportError):
    """Optional package that is not installed."""


class ExportError(DsrcnnError, RuntimeError):
    """Model that cannot be exported, or exported file that disagrees with it."""


class LoaderError(DsrcnnError, RuntimeError):
    """Process that loads images has died."""


class OutOfMemoryError(DsrcnnError, MemoryError):
    """Main memory or GPU memory that ran out."""


class TrainingInterrupted(DsrcnnError):  # noqa: N818  (it is no error)
    """End of a training run by a signal.

    Attributes:
        signal: its number.
    """

    def __init__(self, signal: int, message: str = "") -> None:
        super().__init__(message or f"Interrupted by {Signals(signal).name}.")
        self.signal = signal


class NonFiniteLossError(DsrcnnError, FloatingPointError):
    """Infinite or NaN loss, gradients or weights; no checkpoint has been written with them."""


def message_from_traceback(text: str) -> str | None:
    """Return the message of this package's last error in a printed traceback, None without one."""
    parts = re.split(r"^dsrcnn\.errors\.\w+Error: ", text, flags=re.MULTILINE)
    return parts[-1].strip() if len(parts) > 1 else None


def system_message(error: OSError, what: str) -> str | None:
    """Describe a fault of a disk or path in one line, None for other errors.

    Args:
        error: the error.
        what: the sentence it ends, such as "The results cannot be written".
    """
    if error.errno not in _SYSTEM_ERRORS:
        return None
    file = f" ({error.filename})" if error.filename else ""
    return f"{what}: {error.strerror}{file}."


@contextmanager
def plain_system_errors(what: str) -> Iterator[None]:
    """Turn faults of disks and paths inside into a `DsrcnnError` that begins with `what`."""
    try:
        yield
    except DsrcnnError:
        raise
    except OSError as error:
        message = system_message(error, what)
        if message is None:
            raise
        raise DsrcnnError(message) from error
