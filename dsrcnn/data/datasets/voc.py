"""Pascal VOC folders: ``Annotations/*.xml``, ``JPEGImages/``, ``ImageSets/Main/<split>.txt``."""

from pathlib import Path
from xml.etree import ElementTree

from ...errors import DataError
from .validate import OnError, make_annotation, read_lines


def voc_splits(folder: Path) -> list[str]:
    """List the splits, without those of single classes, such as ``cat_train``."""
    names = {path.stem for path in (folder / "ImageSets/Main").glob("*.txt")}
    return sorted(
        n for n in names if n.rsplit("_", 1)[-1] == n or n.rsplit("_", 1)[-1] not in names
    )


def voc_classes(folder: Path, splits: list[str]) -> list[str]:
    """List the classes of all objects alphabetically, since VOC has no list of classes."""
    names = set()
    for split in splits:
        for image in _image_names(folder, split):
            try:
                objects = _parse_xml(folder, image).iter("object")
            except DataError:  # reported when the records are read
                continue
            names |= {node.findtext("name", "").strip() for node in objects}
    return sorted(names - {""})


def read_voc(folder: Path, split: str, classes: list[str], on_error: OnError) -> list[dict]:
    """Read the unchecked records of a split, in Detectron2's format.

    VOC counts pixels from 1 and includes the last: a box from 1 to 10 covers the first ten.
    ``difficult`` objects become crowds: ignored in training and evaluation.
    """
    labels = {name: label for label, name in enumerate(classes)}
    records = []
    for number, image in enumerate(_image_names(folder, split), start=1):
        path = folder / "Annotations" / f"{image}.xml"
        try:
            root = _parse_xml(folder, image)
            size = {key: int(_text(path, root, f"size/{key}")) for key in ("height", "width")}
        except (DataError, ValueError) as error:
            on_error("annotation broken", _message(path, error))
            continue
        annotations = []
        for node in root.iter("object"):
            try:
                box, name = _parse_box(path, node), _text(path, node, "name")
                is_crowd = bool(int(node.findtext("difficult") or 0))
            except (DataError, ValueError) as error:
                on_error("annotation broken", _message(path, error))
                continue
            if name in labels:
                annotations.append(make_annotation(box, labels[name], is_crowd=is_crowd))
            else:
                known = f"known are {', '.join(classes)}"
                on_error("unknown class", f"{path} has the class {name!r}, {known}; correct it.")
        file_name = root.findtext("filename")
        file = folder / "JPEGImages" / (file_name or "")
        if not (file_name and file.is_file()):
            file = folder / "JPEGImages" / f"{image}.jpg"
        record = {"file_name": str(file), **size, "image_id": number}
        records.append({**record, "annotations": annotations})
    return records


def _parse_box(path: Path, node: ElementTree.Element) -> list[float]:
    edges = ("xmin", "ymin", "xmax", "ymax")
    x1, y1, x2, y2 = (float(_text(path, node, f"bndbox/{edge}")) for edge in edges)
    return [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1]


def _message(path: Path, error: Exception) -> str:
    return str(error) if isinstance(error, DataError) else f"{path}: {error}; correct it."


def _image_names(folder: Path, split: str) -> list[str]:
    path = folder / "ImageSets/Main" / f"{split}.txt"
    if not path.is_file():
        raise DataError(
            f"{path} does not exist; the splits of {folder} are {', '.join(voc_splits(folder))}."
        )
    return [line.split()[0] for line in read_lines(path) if line.strip()]


def _parse_xml(folder: Path, image: str) -> ElementTree.Element:
    path = folder / "Annotations" / f"{image}.xml"
    try:
        return ElementTree.parse(path).getroot()
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist; add it or take {image} off the list.") from error
    except ElementTree.ParseError as error:
        raise DataError(f"{path} is not valid XML ({error}); export it again.") from error


def _text(path: Path, node: ElementTree.Element, key: str) -> str:
    text = node.findtext(key)
    if not text:
        raise DataError(f"{path} lacks {key} in <{node.tag}>; correct it.")
    return text.strip()
