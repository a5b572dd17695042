"""What a reader of annotations does with what it cannot use: end, or collect."""

from collections.abc import Callable
from typing import NoReturn

from ...errors import DataError

__all__ = ["Fail", "refuse"]

# Told the kind ("image", "annotation" or "class") and what is wrong; a reader goes on after it.
Fail = Callable[[str, str], None]


def refuse(kind: str, text: str) -> NoReturn:
    """For training: the first fault ends it."""
    raise DataError(text)
