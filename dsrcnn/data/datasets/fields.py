"""Values of annotation files: converted where they are clear, refused with what is expected.

A converter returns the value to use or raises a `ValueError` with what a file should hold.
"""

import re
import reprlib
from collections.abc import Callable
from typing import Any

from ...errors import DataError

_NUMBERS = {int, float}
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_MAX_SIDE = 1_000_000
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 60
_REPR.maxlevel = 3

Converter = Callable[[Any], Any]


def show(value: object) -> str:
    """Return a value on one short line, for a message."""
    return _REPR.repr(value)


def as_id(value: Any) -> int | str:
    """Convert an id: an integer, a float without fraction, or text such as a UUID."""
    if type(value) is int or (type(value) is str and value.strip()):
        return value
    if type(value) is float and value.is_integer():
        return int(value)
    raise ValueError("an integer or text")


def as_side(value: Any) -> int:
    """Convert width or height of an image."""
    if type(value) in _NUMBERS and 1 <= value <= _MAX_SIDE and value == int(value):
        return int(value)
    raise ValueError(f"pixels as an integer from 1 to {_MAX_SIDE}")


def as_flag(value: Any) -> int:
    """Convert a flag such as ``iscrowd``: 0 or 1 as number, boolean or text."""
    if value in ("0", "1") or (isinstance(value, (bool, int, float)) and value in (0, 1)):
        return int(value)
    raise ValueError("0 or 1")


def as_box(value: Any) -> list[float]:
    """Check a box: a list of four numbers, which may be unusable."""
    if type(value) is list and len(value) == 4 and _NUMBERS.issuperset(map(type, value)):
        return value
    raise ValueError("four numbers without quotes: [x, y, width, height]")


def as_name(value: Any) -> str:
    """Check a class name or a file name."""
    if type(value) is str and value.strip() and not _UNPRINTABLE.search(value):
        return value
    raise ValueError("text in quotes, without line breaks and other control characters")


def check_class_names(names: list[Any], where: str) -> list[str]:
    """Return class names if each is text and none occurs twice; `where` begins the message.

    Raises:
        DataError: for the first name that cannot be used.
    """
    seen: dict[str, int] = {}
    for label, name in enumerate(names):
        try:
            as_name(name)
        except ValueError as error:
            raise DataError(
                f"{where} has the class name {show(name)} (number {label}); write {error}."
            ) from None
        if seen.setdefault(name, label) != label:
            raise DataError(
                f"{where} has the class name {name!r} twice (numbers {seen[name]} and {label}); "
                "rename or merge one of them."
            )
    return list(names)
