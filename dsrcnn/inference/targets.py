"""Files that results are written to: none replaces a source or what no job wrote."""

import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ..errors import ConfigError, DataError
from ..utils.files import prepare_folder
from .sources import source_files
from .videos import is_video

_LOGGER = logging.getLogger(__name__)

PICTURES = "pictures"  # folder of the pictures
_OUTPUTS = {"coco": ("detections.json", "results.json"), "csv": ("detections.csv",)}


def prepare_output(folder: Path, kinds: Sequence[str]) -> None:
    """Create the folder, with an error if something in it is in the way; see `prepare_folder`."""
    files = [name for kind in kinds for name in _OUTPUTS.get(kind, ())]
    prepare_folder(
        folder, "--output", files=files, folders=[PICTURES] if "pictures" in kinds else []
    )


def without_earlier(sources: Sequence[str | int]) -> list[str | int]:
    """Leave out the pictures that earlier jobs wrote below a folder or pattern of the sources.

    Args:
        sources: paths, patterns, folders and numbers of cameras; those that name the written
            pictures themselves stay.

    Raises:
        DataError: if nothing remains.
    """
    left_out = dict[Path, int]()  # pictures by folder
    kept = [part for source in sources for part in _without_earlier(source, left_out)]
    places = ", ".join(map(str, sorted(left_out)))
    if not kept:
        raise DataError(
            f"The sources have no images but those in {places}, where pictures are written. "
            "Correct the paths, or write another --output."
        )
    if left_out:
        _LOGGER.warning(
            "Left out: %d images in %s, where pictures are written. Name that folder, too, to "
            "predict them.", sum(left_out.values()), places,
        )  # fmt: skip
    return kept


def _without_earlier(source: str | int, left_out: dict[Path, int]) -> Sequence[str | int]:
    """Files of a source that no job wrote, or the source itself; counts the others."""
    if isinstance(source, int):
        return [source]
    files = source_files(source)
    counts = Counter(Path(file).parent for file in files)
    written = {place for place in counts if _is_written(place) and not _is_below(source, place)}
    if not written:
        return [source]
    for place in written:
        left_out[place] = left_out.get(place, 0) + counts[place]
    return [file for file in files if Path(file).parent not in written]


def mark_of(pictures: Path) -> Path:
    """Path of the file that marks a folder of pictures as made by a job, so replaceable."""
    return pictures.with_name(f".{pictures.name}_of_dsrcnn")


def _is_written(pictures: Path) -> bool:
    return pictures.is_dir() and mark_of(pictures.resolve()).exists()


def _is_below(path: str | Path, folder: Path) -> bool:
    """Whether a path is a folder or in it, links followed."""
    return Path(path).resolve().is_relative_to(folder.resolve())


def check_targets(sources: Sequence[str | int], kinds: Sequence[str], folder: Path) -> None:
    """Raise a `ConfigError` if results would replace a source, or files that no job wrote."""
    files = [f for source in sources if isinstance(source, str) for f in source_files(source)]
    targets, pictures = list[Path](), folder / PICTURES
    if "pictures" in kinds and pictures.is_dir():
        targets += pictures.iterdir()
    if "video" in kinds:
        names = Names()
        targets += [video_path(folder, names(file)) for file in files if is_video(file)]
    identities = {identity: path for path in targets if (identity := identity_of(path))}
    for file in files:
        identity = identity_of(file)
        if identity is not None and (target := identities.get(identity)):
            raise ConfigError(
                f"--output is {str(folder)!r}, but the source {file!r} is the file {target}, which "
                "results may replace. Write another folder."
            )
    if "pictures" in kinds and not _is_written(pictures) and pictures.is_dir():
        present = sorted(os.listdir(pictures))
        if present:
            raise ConfigError(
                f"--output is {str(folder)!r}, but {pictures} has files that no job wrote, such as "
                f"{present[0]!r}, which pictures could replace. Write another folder."
            )


def identity_of(path: str | Path) -> tuple[int, int] | None:
    """Device and number of a file, equal for all names of it; None if it does not exist."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


class Names:
    """Gives every source a file name of its own, as similar to that of the source as possible."""

    def __init__(self) -> None:
        # Path of a source and number of a frame or of an image in memory, by name.
        self._owners: dict[str, tuple[str | None, int | None]] = {}
        self._count = 0

    def __call__(self, path: str | None) -> str:
        """Return a name without ending; repeated calls with a path give the same."""
        if path is None:
            self._count += 1
            return self.unique(f"image_{self._count:05d}", (None, self._count))
        return self.unique(Path(path).stem or "image", (path, None))

    def unique(self, stem: str, owner: tuple[str | None, int | None]) -> str:
        """Return the stem, numbered if another owner has that name."""
        name, number = stem, 1
        while self._owners.setdefault(name, owner) != owner:
            number += 1
            name = f"{stem}_{number}"
        return name


def video_path(folder: Path, name: str) -> Path:
    """Path of a written video."""
    return folder / f"{name}_predicted.mp4"
