"""YOLO folders: ``data.yaml`` names images and classes, ``labels/*.txt`` hold the boxes."""

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from ...errors import DataError
from ..files import IMAGE_SUFFIXES, file_fault, image_files, is_file, is_folder, read_lines
from ..images import image_file_size
from .fields import check_class_names, show
from .validate import OnError, make_annotation, raise_error, warn_once

_ENDINGS = ", ".join(IMAGE_SUFFIXES)
_SPLITS = ("train", "val", "valid", "test")


def yolo_splits(folder: Path) -> list[str]:
    """List the splits that ``data.yaml`` names, of train, val, valid and test."""
    content = _read_yaml(folder)
    return [split for split in _SPLITS if content.get(split)]


def yolo_split_fault(folder: Path, split: str) -> str | None:
    """Explain why the images of a split that ``data.yaml`` names are absent; None if they exist."""
    try:
        _split_paths(folder, split)
    except DataError as error:
        return str(error)
    return None


def yolo_classes(folder: Path) -> list[str]:
    """Read the class names, in the order of their labels.

    Raises:
        DataError: if ``names`` is no list of different names, or ``nc`` is another number.
    """
    path, content = folder / "data.yaml", _read_yaml(folder)
    names, count = content.get("names"), content.get("nc")
    if isinstance(names, dict):
        labels = [int(k) if isinstance(k, str) and k.isdecimal() else k for k in names]
        if {(type(k), k) for k in labels} != {(int, k) for k in range(len(labels))}:
            raise DataError(
                f"{path}: names has the numbers {show(list(names))}; number classes from 0 "
                "without gaps."
            )
        by_label = dict(zip(labels, names.values(), strict=True))
        names = [by_label[label] for label in range(len(labels))]
    if not names:
        raise DataError(f"{path} lacks names; list the classes.")
    if not isinstance(names, list):
        raise DataError(f"{path}: names is {show(names)}; list the classes: [first, second].")
    if count is not None and (isinstance(count, bool) or count != len(names)):
        raise DataError(
            f"{path}: nc is {show(count)}, but names lists {len(names)} classes; correct one of "
            "them."
        )
    return check_class_names(names, str(path))


def read_yolo(folder: Path, split: str, classes: list[str], on_error: OnError) -> list[dict]:
    """Read the unchecked records of a split; an image without a label file has no objects."""
    records, has_keypoints = [], "kpt_shape" in _read_yaml(folder)
    owners: dict[Path, Path] = {}
    shared = []
    for number, image in enumerate(_image_files(folder, split, on_error), start=1):
        width = height = 0
        annotations = []
        try:
            width, height = image_file_size(image)
        except ValueError as error:
            text = f"Image {image} cannot be read ({error}); replace it or remove it."
            on_error("image broken", text)
        else:
            path = _label_file(image)
            owner = owners.setdefault(path, image)
            if owner != image and is_file(path):
                shared.append(f"{owner} and {image.name} share {path.name}")
            size = width, height
            annotations = _read_labels(path, size, len(classes), has_keypoints, on_error)
        record = {"file_name": str(image), "height": height, "width": width, "image_id": number}
        records.append({**record, "annotations": annotations})
    if shared and on_error is raise_error:
        what = f"{len(shared)} images share the label file of another (duplicate image)"
        warn_once(f"Split {split!r} of {folder}", what, shared)
    for text in shared if on_error is not raise_error else ():
        on_error("duplicate image", f"{text}; rename one of them.")
    _report_unused_labels(folder, split, owners, on_error)
    return records


def _report_unused_labels(
    folder: Path, split: str, used: Collection[Path], on_error: OnError
) -> None:
    """Report label files without an image, which may be missing or of a kind that is not read."""
    unused: list[str] = []
    for path in _split_paths(folder, split):
        labels = _label_file(path / "any.jpg").parent
        # Labels of a list may be of another split, and beside images there are other texts.
        if path.suffix != ".txt" and labels != path:
            files = (p for p in labels.rglob("*.txt") if p not in used)
            unused += (str(p) for p in files if p.name != "classes.txt" and p.name[0] != ".")
    if unused and on_error is raise_error:
        what = f"{len(unused)} label files have no image (label without image)"
        warn_once(f"Split {split!r} of {folder}", what, sorted(unused))
    for name in sorted(unused) if on_error is not raise_error else ():
        on_error("label without image", f"{name}; read are images with the endings {_ENDINGS}.")


def _read_labels(
    path: Path, size: tuple[int, int], num_classes: int, has_keypoints: bool, on_error: OnError
) -> list[dict[str, Any]]:
    annotations: list[dict[str, Any]] = []
    if not is_file(path):
        if os.path.lexists(path):
            on_error("annotation broken", f"Label file {path} {file_fault(path)}; replace it.")
        return annotations
    try:
        lines = read_lines(path)
    except DataError as error:
        on_error("annotation broken", str(error))
        return annotations
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            label, x, y, w, h = _parse_line(line, has_keypoints)
        except ValueError:
            on_error(
                "annotation broken",
                f"{path}, line {number}: {line[:80]!r}; write class, center x, center y, width and "
                "height, as fractions of the image, or class and the corners of a polygon.",
            )
            continue
        if not (label.is_integer() and 0 <= label < num_classes):
            known = f"data.yaml names classes 0 to {num_classes - 1}"
            on_error("unknown class", f"{path}, line {number}: class {label:g}; {known}.")
            continue
        width, height = size
        box = [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height]
        annotations.append(make_annotation(box, int(label)))
    return annotations


def _parse_line(line: str, has_keypoints: bool) -> tuple[float, float, float, float, float]:
    """Parse class, center, width and height of a box, or of the bounding box of a polygon."""
    label, *values = (float(word) for word in line.split())
    if has_keypoints and len(values) > 4:
        values = values[:4]
    if len(values) in (4, 5):  # a fifth value is the confidence of a prediction
        return label, values[0], values[1], values[2], values[3]
    xs, ys = values[0::2], values[1::2]
    if len(xs) < 3 or len(xs) != len(ys):
        raise ValueError
    x1, y1, x2, y2 = min(xs), min(ys), max(xs), max(ys)
    return label, (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1


def _label_file(image: Path) -> Path:
    """Replace the last folder ``images`` of the path by ``labels``."""
    parts = list(image.parts)
    places = [index for index, part in enumerate(parts[:-1]) if part == "images"]
    if places:
        parts[places[-1]] = "labels"
    return Path(*parts).with_suffix(".txt")


def _image_files(folder: Path, split: str, on_error: OnError) -> list[Path]:
    images: list[Path] = []
    for path in _split_paths(folder, split):
        if path.suffix != ".txt":
            images += sorted(map(Path, image_files(path)))
            continue
        root = str(_read_yaml(folder).get("path") or "")
        for line in filter(None, map(str.strip, read_lines(path))):
            try:
                images.append(_resolve(folder, root, line))
            except DataError as error:
                on_error("image missing", str(error))
    return images


def _split_paths(folder: Path, split: str) -> list[Path]:
    """Return the image folders and lists of images of a split."""
    path, content = folder / "data.yaml", _read_yaml(folder)
    entries = content.get(split)
    if not entries:
        raise DataError(f"{path} has no {split}; it has {', '.join(yolo_splits(folder))}.")
    root, paths = str(content.get("path") or ""), []
    for entry in entries if isinstance(entries, list) else [entries]:
        if not isinstance(entry, str):
            text = f"{path}: {split} is {show(entries)}"
            raise DataError(f"{text}; write a folder of images, a list of images, or several.")
        paths.append(_resolve(folder, root, entry))
        if paths[-1].suffix != ".txt" and not is_folder(paths[-1]):
            fault = "is no folder" if is_file(paths[-1]) else file_fault(paths[-1])
            raise DataError(f"{path}: {split} names {entry}, but {paths[-1]} {fault}.")
    return paths


def _resolve(folder: Path, root: str, name: str) -> Path:
    """Look a path up relative to ``path``, often that of another machine, and to the yaml file."""
    name = name if "\\" not in name else name.replace("\\", "/")  # of Windows
    # Some exports write "../train/images" for a folder beside the yaml file.
    candidates = [folder / root / name, folder / name, folder / name.removeprefix("../")]
    for path in candidates:
        if is_file(path) or is_folder(path):
            return path
    faults = (f"{path} {file_fault(path)}" for path in candidates)
    odd = [fault for fault in faults if not fault.endswith("does not exist")]
    text = odd[0] if odd else f"which is not at {candidates[0]}"
    raise DataError(f"{folder / 'data.yaml'} names {show(name)[1:-1]}, {text}.")


def _read_yaml(folder: Path) -> dict[str, Any]:
    path = folder / "data.yaml"
    try:
        content = yaml.safe_load("\n".join(read_lines(path)))
    except DataError:
        raise
    except Exception as error:  # its constructors raise anything
        text = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path} is not valid YAML: {text}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds no keys; it needs train, val and names.")
    return content
