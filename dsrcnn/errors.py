"""Errors for invalid input.

Every message names the key or file, its value, the expected value and the next action. The command
line prints the message without a traceback.
"""

import re


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


class NonFiniteLossError(DsrcnnError, FloatingPointError):
    """Training step with an infinite or NaN loss; the model was not updated."""


def message_from_traceback(text: str) -> str | None:
    """Return the message of this package's last error in a printed traceback, None without one."""
    parts = re.split(r"^dsrcnn\.errors\.\w+Error: ", text, flags=re.MULTILINE)
    return parts[-1].strip() if len(parts) > 1 else None
