"""Pascal VOC folders: ``Annotations/*.xml``, ``JPEGImages/``, ``ImageSets/Main/<split>.txt``."""

import re
from pathlib import Path, PurePath
from xml.etree import ElementTree

from ...errors import DataError
from ..files import IMAGE_SUFFIXES, is_file, read_bytes, read_lines
from .fields import as_flag, as_side, check_class_names
from .validate import OnError, make_annotation, raise_error, warn_once

_SUFFIXES = tuple(case for suffix in IMAGE_SUFFIXES for case in (suffix, suffix.upper()))
_FLAG = re.compile(r"\s+(-1|0|1)$")


def voc_splits(folder: Path) -> list[str]:
    """List the splits, without those of single classes, such as ``cat_train``."""
    names = {path.stem for path in (folder / "ImageSets/Main").glob("*.txt") if is_file(path)}
    return sorted(
        n for n in names if n.rsplit("_", 1)[-1] == n or n.rsplit("_", 1)[-1] not in names
    )


def voc_classes(folder: Path, splits: list[str], on_error: OnError) -> list[str]:
    """List the classes of all objects alphabetically, since VOC has no list of classes.

    Raises:
        DataError: if no object has a class.
    """
    names, faults = set(), []
    for split in splits:
        for image in _image_names(folder, split):
            try:
                objects = _parse_xml(folder, image).iter("object")
            except DataError as error:
                on_error("annotation broken", str(error))
                faults.append(str(error))
                continue
            names |= {node.findtext("name", "").strip() for node in objects}
    if not names - {""}:
        text = f"{folder / 'Annotations'} has no object with a name in {', '.join(splits)}"
        raise DataError(faults[0] if faults else f"{text}; check the annotations.")
    return check_class_names(sorted(names - {""}), str(folder / "Annotations"))


def read_voc(folder: Path, split: str, classes: list[str], on_error: OnError) -> list[dict]:
    """Read the unchecked records of a split, in Detectron2's format.

    VOC counts pixels from 1 and includes the last: a box from 1 to 10 covers the first ten.
    ``difficult`` objects become crowds: ignored in training and evaluation.
    """
    labels = {name: label for label, name in enumerate(classes)}
    records, renamed = [], []
    for number, image in enumerate(_image_names(folder, split), start=1):
        path = folder / "Annotations" / f"{image}.xml"
        try:
            root = _parse_xml(folder, image)
            size = {key: _side(path, root, key) for key in ("height", "width")}
        except (DataError, ValueError) as error:
            on_error("annotation broken", _message(path, error))
            continue
        annotations = []
        for node in root.iter("object"):
            try:
                box, name = _parse_box(path, node), _text(path, node, "name")
                is_crowd = bool(as_flag((node.findtext("difficult") or "0").strip()))
            except (DataError, ValueError) as error:
                on_error("annotation broken", _message(path, error))
                continue
            if name in labels:
                annotations.append(make_annotation(box, labels[name], is_crowd=is_crowd))
            else:
                known = f"known are {', '.join(classes)}"
                on_error("unknown class", f"{path} has the class {name!r}, {known}; correct it.")
        file, is_renamed = _find_image(folder / "JPEGImages", image, root.findtext("filename"))
        if is_renamed:
            renamed.append(f"{path.name} names {file.name}")
        record = {"file_name": str(file), **size, "image_id": number}
        records.append({**record, "annotations": annotations})
    if renamed and on_error is raise_error:
        what = f"{len(renamed)} annotation files name an image of another name, which is used"
        warn_once(f"Split {split!r} of {folder}", what, renamed)
    return records


def _find_image(images: Path, name: str, file_name: str | None) -> tuple[Path, bool]:
    """Return the image of an annotation file, and whether it has another name.

    An image named like the annotation file precedes ``<filename>``, which is often outdated, of
    another format or with a path of another machine.
    """
    own = [images / f"{name}{suffix}" for suffix in _SUFFIXES]
    written = PurePath((file_name or "").strip())
    if not written.name or not _is_inside(written):
        return next(filter(is_file, own), own[0]), False
    is_renamed = str(written.with_suffix("")) != name
    other = images / written
    found = filter(is_file, [*own, other] if is_renamed else [other, *own])
    file = next(found, own[0])
    return file, is_renamed and file == other


def _is_inside(path: PurePath) -> bool:
    """Whether a path that is relative to a folder stays in it."""
    return not path.is_absolute() and ".." not in path.parts


def _side(path: Path, root: ElementTree.Element, key: str) -> int:
    text = _text(path, root, f"size/{key}")
    try:
        return as_side(float(text) if text.isascii() else text)
    except ValueError:
        expected = "pixels as an integer of at least 1"
        raise DataError(f"{path} has size/{key} {text!r}; expected {expected}.") from None


def _parse_box(path: Path, node: ElementTree.Element) -> list[float]:
    edges = ("xmin", "ymin", "xmax", "ymax")
    x1, y1, x2, y2 = (float(_text(path, node, f"bndbox/{edge}")) for edge in edges)
    return [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1]


def _message(path: Path, error: Exception) -> str:
    return str(error) if isinstance(error, DataError) else f"{path}: {error}; correct it."


def _image_names(folder: Path, split: str) -> list[str]:
    advice = f"the splits of {folder} are {', '.join(voc_splits(folder))}."
    lines = read_lines(folder / "ImageSets/Main" / f"{split}.txt", advice)
    names = [line.strip() for line in lines if line.strip()]
    # Lists of single classes have -1, 0 or 1 behind every name. Names may have spaces, too.
    if all(map(_FLAG.search, names)):
        names = [name if _has_file(folder, name) else _FLAG.sub("", name) for name in names]
    for name in names:
        if not _is_inside(PurePath(name)):
            text = f"{folder / 'ImageSets/Main' / split}.txt names {name!r}"
            raise DataError(f"{text}, which is not in {folder / 'JPEGImages'}; correct the list.")
    return names


def _has_file(folder: Path, image: str) -> bool:
    return is_file(folder / "Annotations" / f"{image}.xml")


def _parse_xml(folder: Path, image: str) -> ElementTree.Element:
    path = folder / "Annotations" / f"{image}.xml"
    content = read_bytes(path, f"add it or take {image} off the list.")
    try:
        return ElementTree.fromstring(content)
    except (ElementTree.ParseError, LookupError, ValueError) as error:  # or an unknown encoding
        raise DataError(f"{path} is not valid XML ({error}); export it again.") from error


def _text(path: Path, node: ElementTree.Element, key: str) -> str:
    text = (node.findtext(key) or "").strip()
    if not text:
        raise DataError(f"{path} lacks {key} in <{node.tag}>; correct it.")
    return text
