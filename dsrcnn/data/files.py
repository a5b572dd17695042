"""Files that are opened only if they are regular: a named pipe or a device would block."""

import os
import stat
from pathlib import Path

from ..errors import DataError

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def file_fault(path: str | Path) -> str | None:
    """Explain why a path is no regular file, such as "does not exist"; None if it is one."""
    try:
        kind = stat.S_IFMT(os.stat(path).st_mode)
    except FileNotFoundError:
        return "does not exist"
    except (OSError, ValueError) as error:  # a loop of links, a name that is too long or has a NUL
        return f"cannot be opened ({getattr(error, 'strerror', None) or error})"
    return None if kind == stat.S_IFREG else f"is {_KINDS.get(kind, 'no file')}, not a file"


def is_file(path: str | Path) -> bool:
    """Whether a path is a regular file or a link to one; unlike `Path.is_file`, never raises."""
    return file_fault(path) is None


def is_folder(path: str | Path) -> bool:
    """Whether a path is a folder or a link to one; unlike `Path.is_dir`, never raises."""
    return file_fault(path) == f"is {_KINDS[stat.S_IFDIR]}, not a file"


def read_bytes(path: str | Path, advice: str = "check the path.") -> bytes:
    """Read a regular file.

    Raises:
        DataError: that ends with `advice`, if it is no regular file or cannot be read.
    """
    fault = file_fault(path)
    if fault is None:
        try:
            return Path(path).read_bytes()
        except OSError as error:
            fault = f"cannot be read ({error.strerror})"
    raise DataError(f"{path} {fault}; {advice}")


def read_lines(path: str | Path, advice: str = "check the path.") -> list[str]:
    """Read the lines of a UTF-8 text file.

    Raises:
        DataError: if it cannot be read or is not UTF-8.
    """
    try:
        return read_bytes(path, advice).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text in UTF-8 ({error}); save it again.") from error
