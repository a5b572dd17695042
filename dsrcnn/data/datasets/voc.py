"""Pascal VOC folders: ``Annotations/*.xml``, ``JPEGImages/``, ``ImageSets/Main/<split>.txt``."""

from pathlib import Path
from xml.etree import ElementTree

from detectron2.structures import BoxMode

from ...errors import DataError
from .validate import Fail, check_records, read_lines, refuse

__all__ = ["load_voc", "read_voc", "voc_classes", "voc_splits"]


def voc_splits(folder: Path) -> list[str]:
    """Names of the lists of images; those of single classes (``cat_train``) are none."""
    names = {path.stem for path in (folder / "ImageSets/Main").glob("*.txt")}
    return sorted(
        n for n in names if n.rsplit("_", 1)[-1] == n or n.rsplit("_", 1)[-1] not in names
    )


def voc_classes(folder: Path, splits: list[str]) -> list[str]:
    """Class names of all objects of the splits, in alphabetical order: VOC lists them nowhere."""
    names = set()
    for split in splits:
        for image in _images_of(folder, split):
            try:
                objects = _parse(folder, image).iter("object")
            except DataError:  # said when the split is read
                continue
            names |= {node.findtext("name", "").strip() for node in objects}
    return sorted(names - {""})


def load_voc(folder: Path, split: str, classes: list[str]) -> list[dict]:
    """Records of a split that can be trained on; see `read_voc`.

    Raises:
        DataError: if a file is missing or broken, or an object is of an unknown class.
    """
    records = read_voc(folder, split, classes, refuse)
    check_records(records, str(_list_of(folder, split)), str(folder / "JPEGImages"))
    return records


def read_voc(folder: Path, split: str, classes: list[str], fail: Fail) -> list[dict]:
    """Records of a split, as they are.

    VOC counts pixels from 1 and includes the last one: a box from 1 to 10 covers the first ten.
    Objects marked ``difficult`` are treated like COCO's crowds: not learned, no fault if detected
    or missed.
    """
    labels = {name: index for index, name in enumerate(classes)}
    records = []
    for number, image in enumerate(_images_of(folder, split), start=1):
        where = folder / "Annotations" / f"{image}.xml"
        try:
            root = _parse(folder, image)
            size = {key: int(_text(where, root, f"size/{key}")) for key in ("height", "width")}
        except (DataError, ValueError) as error:
            fail("annotation", _said_of(where, error))
            continue
        annotations = []
        for node in root.iter("object"):
            try:
                annotation, label = _box(where, node), _text(where, node, "name")
            except (DataError, ValueError) as error:
                fail("annotation", _said_of(where, error))
                continue
            if label not in labels:
                known = ", ".join(classes)
                fail("class", f"{where} has the class {label!r}, known are {known}; correct it.")
                continue
            annotations.append({**annotation, "category_id": labels[label]})
        path = str(_image_file(folder, image, root.findtext("filename")))
        record = {"file_name": path, **size, "image_id": number, "annotations": annotations}
        records.append(record)
    return records


def _box(where: Path, node: ElementTree.Element) -> dict:
    edges = ("xmin", "ymin", "xmax", "ymax")
    x1, y1, x2, y2 = (float(_text(where, node, f"bndbox/{edge}")) for edge in edges)
    return {
        "bbox": [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1],
        "bbox_mode": BoxMode.XYWH_ABS,
        "iscrowd": int(node.findtext("difficult") or 0),
    }


def _said_of(where: Path, error: Exception) -> str:
    return str(error) if isinstance(error, DataError) else f"{where}: {error}; correct it."


def _image_file(folder: Path, image: str, name: str | None) -> Path:
    """The file that the annotation names, or the one named like it."""
    named = folder / "JPEGImages" / (name or "")
    return named if name and named.is_file() else folder / "JPEGImages" / f"{image}.jpg"


def _list_of(folder: Path, split: str) -> Path:
    return folder / "ImageSets/Main" / f"{split}.txt"


def _images_of(folder: Path, split: str) -> list[str]:
    path = _list_of(folder, split)
    if not path.is_file():
        raise DataError(
            f"{path} does not exist; the splits of {folder} are {', '.join(voc_splits(folder))}."
        )
    return [line.split()[0] for line in read_lines(path) if line.strip()]


def _parse(folder: Path, image: str) -> ElementTree.Element:
    path = folder / "Annotations" / f"{image}.xml"
    try:
        return ElementTree.parse(path).getroot()
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist; add it or take {image} off the list.") from error
    except ElementTree.ParseError as error:
        raise DataError(f"{path} is not valid XML ({error}); export it again.") from error


def _text(where: Path, node: ElementTree.Element, key: str) -> str:
    text = node.findtext(key)
    if not text:
        raise DataError(f"{where} lacks {key} in <{node.tag}>; correct it.")
    return text.strip()
