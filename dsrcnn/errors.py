"""What this package raises when its input is wrong.

Every message names the thing, the value found, the value expected and the next action. The command
line prints the message alone; a traceback would only hide it.
"""

__all__ = ["ConfigError", "DataError", "DsrcnnError", "NonFiniteLossError", "WeightsError"]


class DsrcnnError(Exception):
    """Base of the package's own errors: bad input, not a defect of the program."""


class ConfigError(DsrcnnError, ValueError):
    """A configuration key or value that cannot work."""


class DataError(DsrcnnError, ValueError):
    """A data set, annotation or image that cannot be used."""


class WeightsError(DsrcnnError, RuntimeError):
    """A weight file that is missing or does not fit the model."""


class NonFiniteLossError(DsrcnnError, FloatingPointError):
    """A training step whose loss is infinite or NaN; the model was not updated with it."""
