"""Output files and folders: checked before the work whose results they take."""

import os
import stat
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ..errors import ConfigError, system_message

_TRIAL = bytes(2**20)  # a full disk may still have room for a few bytes


def prepare_folder(
    folder: str | Path, name: str, *, files: Sequence[str] = (), folders: Sequence[str] = ()
) -> Path:
    """Create a folder and write to it, so that a fault is found before long work.

    Args:
        folder: path.
        name: key or option that names it, for the message.
        files: names of files in it that will be written; a device is a file, a named pipe is not.
        folders: names of folders in it that will be written to.

    Raises:
        ConfigError: if it is a file or cannot be created, nothing can be written to it, or what is
            in it is in the way.
    """
    path = Path(folder)
    try:
        if not str(folder).strip() or "\0" in str(folder):
            raise ConfigError(f"{name} is {str(folder)!r}; write the path of a folder.")
        if os.path.lexists(path) and not path.is_dir():
            raise ConfigError(f"{name} is {str(folder)!r}, which is a file; write a folder.")
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(_TRIAL)
        for entry in (*files, *folders):
            _check_kind(path / entry, name, is_folder=entry in folders)
    except OSError as error:
        reason = system_message(error, f"{name} is {str(folder)!r}, which cannot be written to")
        raise ConfigError(f"{reason or error} Write another folder, or make room.") from error
    return path


def _check_kind(path: Path, name: str, *, is_folder: bool) -> None:
    if not path.exists():
        return
    mode = path.stat().st_mode
    fits = stat.S_ISDIR(mode) if is_folder else stat.S_ISREG(mode) or stat.S_ISCHR(mode)
    if not fits:
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFREG: "a file", stat.S_IFIFO: "a named pipe"}
        raise ConfigError(
            f"{name} is {str(path.parent)!r}, where {path.name} is "
            f"{kinds.get(stat.S_IFMT(mode), 'a device or socket')}, not a "
            f"{'folder' if is_folder else 'file'}. Delete it, or write another folder."
        )


def prepare_file(path: str | Path, name: str, endings: tuple[str, ...]) -> Path:
    """Check the path of an output file like `prepare_folder`, and its ending.

    Raises:
        ConfigError: if it is a folder, has another ending, or its folder cannot be written to.
    """
    path = Path(path)
    if path.suffix.lower() not in endings:
        raise ConfigError(
            f"{name} is {str(path)!r}; write a file that ends in one of {', '.join(endings)}."
        )
    prepare_folder(path.parent, name)
    if path.is_dir():
        raise ConfigError(f"{name} is {str(path)!r}, which is a folder; write a file.")
    return path
