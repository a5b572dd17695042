"""YOLO folders: ``data.yaml`` names images and classes, ``labels/*.txt`` hold the boxes."""

from pathlib import Path
from typing import Any

import yaml

from ...errors import DataError
from .validate import OnError, image_file_size, make_annotation, read_lines

_IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def yolo_splits(folder: Path) -> list[str]:
    """List the splits that ``data.yaml`` names, of train, val and test."""
    content = _read_yaml(folder)
    return [split for split in ("train", "val", "test") if content.get(split)]


def yolo_classes(folder: Path) -> list[str]:
    """Read the class names, in the order of their labels."""
    names = _read_yaml(folder).get("names")
    if isinstance(names, dict):
        if sorted(names) != list(range(len(names))):
            raise DataError(
                f"{folder / 'data.yaml'}: names has the numbers {sorted(names)}; number classes "
                "from 0 without gaps."
            )
        names = [names[label] for label in range(len(names))]
    if not names:
        raise DataError(f"{folder / 'data.yaml'} lacks names; list the classes.")
    return [str(name) for name in names]


def read_yolo(folder: Path, split: str, classes: list[str], on_error: OnError) -> list[dict]:
    """Read the unchecked records of a split; an image without a label file has no objects."""
    records = []
    for number, image in enumerate(_image_files(folder, split, on_error), start=1):
        width = height = 0
        annotations = []
        try:
            width, height = image_file_size(image)
        except (OSError, SyntaxError, ValueError) as error:
            text = f"Image {image} cannot be read ({error}); replace it or remove it."
            on_error("image broken", text)
        else:
            path = _label_file(image)
            annotations = _read_labels(path, width, height, len(classes), on_error)
        record = {"file_name": str(image), "height": height, "width": width, "image_id": number}
        records.append({**record, "annotations": annotations})
    return records


def _read_labels(
    path: Path, width: int, height: int, num_classes: int, on_error: OnError
) -> list[dict[str, Any]]:
    annotations = []
    for number, line in enumerate(read_lines(path) if path.is_file() else [], start=1):
        if not line.strip():
            continue
        try:
            label, x, y, w, h = _parse_line(line)
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
        box = [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height]
        annotations.append(make_annotation(box, int(label)))
    return annotations


def _parse_line(line: str) -> tuple[float, float, float, float, float]:
    """Parse class, center, width and height of a box, or of the bounding box of a polygon."""
    label, *values = (float(word) for word in line.split())
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
    content = _read_yaml(folder)
    entries = content.get(split)
    if not entries:
        raise DataError(
            f"{folder / 'data.yaml'} has no {split}; it has {', '.join(yolo_splits(folder))}."
        )
    root = str(content.get("path") or "")
    images: list[Path] = []
    for entry in entries if isinstance(entries, list) else [entries]:
        path = _resolve(folder, root, str(entry))
        if path.suffix != ".txt":
            images += sorted(p for p in path.rglob("*") if p.suffix.lower() in _IMAGE_SUFFIXES)
            continue
        for line in filter(None, map(str.strip, read_lines(path))):
            try:
                images.append(_resolve(folder, root, line))
            except DataError as error:
                on_error("image missing", str(error))
    return images


def _resolve(folder: Path, root: str, name: str) -> Path:
    """Look a path up relative to ``path``, often that of another machine, and to the yaml file."""
    # Some exports write "../train/images" for a folder beside the yaml file.
    candidates = [folder / root / name, folder / name, folder / name.removeprefix("../")]
    for path in candidates:
        if path.exists():
            return path
    raise DataError(f"{folder / 'data.yaml'} names {name}, which is not at {candidates[0]}.")


def _read_yaml(folder: Path) -> dict[str, Any]:
    path = folder / "data.yaml"
    try:
        content = yaml.safe_load("\n".join(read_lines(path)))
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist.") from error
    except yaml.YAMLError as error:
        raise DataError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds no keys; it needs train, val and names.")
    return content
