"""What this package raises when its input is wrong.

Every message names the thing, the value found, the value expected and the next action. The command
line prints the message alone; a traceback would only hide it.
"""

import re

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DsrcnnError",
    "NonFiniteLossError",
    "UnreadableWeightsError",
    "WeightsError",
    "message_from_traceback",
]


class DsrcnnError(Exception):
    """Base of the package's own errors: bad input, not a defect of the program."""

    def __init__(self, message: str) -> None:
        # A loader worker's exception arrives with the worker's traceback as its message.
        super().__init__(message_from_traceback(message) or message)


class ConfigError(DsrcnnError, ValueError):
    """A configuration key or value that cannot work."""


class DataError(DsrcnnError, ValueError):
    """A data set, annotation or image that cannot be used."""


class WeightsError(DsrcnnError, RuntimeError):
    """A weight file that is missing or does not fit the model."""


class UnreadableWeightsError(WeightsError):
    """A weight file that is damaged, such as one whose writing was cut off."""


class CheckpointError(DsrcnnError, OSError):
    """A checkpoint that could not be written; earlier ones are untouched."""


class NonFiniteLossError(DsrcnnError, FloatingPointError):
    """A training step whose loss is infinite or NaN; the model was not updated with it."""


def message_from_traceback(text: str) -> str | None:
    """The message of the last error of this package in a printed traceback, None without one."""
    found = re.split(r"^dsrcnn\.errors\.\w+Error: ", text, flags=re.MULTILINE)
    return found[-1].strip() if len(found) > 1 else None
