"""What a reader of annotations does with what it cannot use: end, or collect."""

from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from ...errors import DataError

__all__ = ["Fail", "read_lines", "refuse"]

# Told the kind and what is wrong; a reader goes on after it. Kinds: "image" (missing), "broken"
# (image), "annotation", "class" and "id".
Fail = Callable[[str, str], None]


def refuse(kind: str, text: str) -> NoReturn:
    """For training: the first fault ends it."""
    raise DataError(text)


def read_lines(path: Path) -> list[str]:
    """Lines of a text file.

    Raises:
        DataError: if it is no text in UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text in UTF-8 ({error}); save it again.") from error
