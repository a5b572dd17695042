"""Files that are opened only if they are regular (a pipe would block), and folders of images."""

import os
import stat
from pathlib import Path

from ..errors import DataError

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"),
    *(".jp2", ".jfif"),
)
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


def image_files(folder: Path) -> list[str]:
    """Image files in a folder and below, links followed, sorted, without hidden ones.

    Links to folders above would lead to images of other sets, and are not followed. What has the
    name of an image and is no file, such as an empty folder, and folders that cannot be listed, are
    among the files, so that they are reported when they are read.
    """
    found, visited = list[str](), set[tuple[int, int]]()
    top = Path(os.path.realpath(folder))

    def add_unreadable(error: OSError) -> None:
        found.append(str(error.filename))

    for place, folders, names in os.walk(folder, onerror=add_unreadable, followlinks=True):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in visited:  # a link to a folder that is read already
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        found += [os.path.join(place, name) for name in names if _names_image(name)]
        if _names_image(os.path.basename(place)) and not names and not folders:
            found.append(place)
        below = (n for n in folders if not n.startswith("."))
        folders[:] = sorted(
            (n for n in below if not _leads_above(Path(place, n), top)),
            key=lambda n: (os.path.islink(f"{place}/{n}"), n),
        )
    return sorted(found)


def _names_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def _leads_above(path: Path, top: Path) -> bool:
    return path.is_symlink() and top.is_relative_to(os.path.realpath(path))


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
