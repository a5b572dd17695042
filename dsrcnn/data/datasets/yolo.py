"""YOLO folders: ``data.yaml`` names images and classes, ``labels/*.txt`` hold the boxes."""

from pathlib import Path
from typing import Any

import yaml
from detectron2.structures import BoxMode

from ...errors import DataError
from .validate import Fail, check_records, read_lines, refuse, shown_size

__all__ = ["load_yolo", "read_yolo", "yolo_classes", "yolo_splits"]

_IMAGES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def yolo_splits(folder: Path) -> list[str]:
    """Which of train, val and test ``data.yaml`` names."""
    return [split for split in ("train", "val", "test") if _read(folder).get(split)]


def yolo_classes(folder: Path) -> list[str]:
    """Class names in the order of their numbers."""
    names = _read(folder).get("names")
    if isinstance(names, dict):
        if sorted(names) != list(range(len(names))):
            raise DataError(
                f"{folder / 'data.yaml'}: names has the numbers {sorted(names)}; number classes "
                "from 0 without gaps."
            )
        names = [names[index] for index in range(len(names))]
    if not names:
        raise DataError(f"{folder / 'data.yaml'} lacks names; list the classes.")
    return [str(name) for name in names]


def load_yolo(folder: Path, split: str, classes: list[str]) -> list[dict]:
    """Records of a split that can be trained on; see `read_yolo`.

    Raises:
        DataError: if a file is missing or broken, or an object is of an unknown class.
    """
    records = read_yolo(folder, split, classes, refuse)
    check_records(records, str(folder / "data.yaml"), str(folder))
    return records


def read_yolo(folder: Path, split: str, classes: list[str], fail: Fail) -> list[dict]:
    """Records of a split, as they are; an image without a label file has no objects."""
    records = []
    for number, image in enumerate(_images_of(folder, split, fail), start=1):
        width = height = 0
        annotations = []
        try:
            width, height = shown_size(image)
        except (OSError, SyntaxError, ValueError) as error:
            fail("broken", f"Image {image} cannot be read ({error}); replace it or remove it.")
        else:
            label_file = _label_file(image)
            annotations = _annotations(label_file, width, height, len(classes), fail)
        records.append(
            {
                "file_name": str(image),
                "height": height,
                "width": width,
                "image_id": number,
                "annotations": annotations,
            }
        )
    return records


def _annotations(path: Path, width: int, height: int, classes: int, fail: Fail) -> list[dict]:
    annotations = []
    lines = read_lines(path) if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            label, x, y, w, h = _numbers(line)
        except ValueError:
            fail(
                "annotation",
                f"{path}, line {number}: {line[:80]!r}; write class, centre x, centre y, width and "
                "height, as fractions of the image, or class and the corners of a polygon.",
            )
            continue
        if not (label.is_integer() and 0 <= label < classes):
            known = f"data.yaml names classes 0 to {classes - 1}"
            fail("class", f"{path}, line {number}: class {label:g}; {known}.")
            continue
        box = [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height]
        entry: dict[str, Any] = {"bbox": box, "bbox_mode": BoxMode.XYWH_ABS, "iscrowd": 0}
        annotations.append({**entry, "category_id": int(label)})
    return annotations


def _numbers(line: str) -> tuple[float, float, float, float, float]:
    """Class, centre, width and height; of a polygon those of the box around it."""
    label, *rest = (float(word) for word in line.split())
    if len(rest) in (4, 5):  # a fifth one is the confidence of a prediction
        return label, rest[0], rest[1], rest[2], rest[3]
    xs, ys = rest[0::2], rest[1::2]
    if len(xs) < 3 or len(xs) != len(ys):
        raise ValueError
    x1, y1, x2, y2 = min(xs), min(ys), max(xs), max(ys)
    return label, (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1


def _label_file(image: Path) -> Path:
    """``images`` becomes ``labels``, where it occurs last in the path."""
    parts = list(image.parts)
    places = [index for index, part in enumerate(parts[:-1]) if part == "images"]
    if places:
        parts[places[-1]] = "labels"
    return Path(*parts).with_suffix(".txt")


def _images_of(folder: Path, split: str, fail: Fail) -> list[Path]:
    content = _read(folder)
    named = content.get(split)
    if not named:
        raise DataError(
            f"{folder / 'data.yaml'} has no {split}; it has {', '.join(yolo_splits(folder))}."
        )
    images: list[Path] = []
    for entry in named if isinstance(named, list) else [named]:
        path = _find(folder, str(content.get("path") or ""), str(entry))
        if path.suffix == ".txt":
            lines = [line.strip() for line in read_lines(path) if line.strip()]
            for line in lines:
                try:
                    images.append(_find(folder, str(content.get("path") or ""), line))
                except DataError as error:
                    fail("image", str(error))
        else:
            images += sorted(p for p in path.rglob("*") if p.suffix.lower() in _IMAGES)
    return images


def _find(folder: Path, root: str, name: str) -> Path:
    """Relative to ``path`` of the yaml, which is often that of another machine, or to the yaml."""
    choices = [folder / root / name, folder / name]
    # Exports have "../train/images" where train/ lies beside the yaml.
    choices.append(folder / name.removeprefix("../"))
    found = next((path for path in choices if path.exists()), None)
    if found is None:
        raise DataError(f"{folder / 'data.yaml'} names {name}, which is not at {choices[0]}.")
    return found


def _read(folder: Path) -> dict[str, Any]:
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
