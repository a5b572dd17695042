"""Pascal VOC folders: ``Annotations/*.xml``, ``JPEGImages/``, ``ImageSets/Main/<split>.txt``."""

from pathlib import Path
from typing import NoReturn
from xml.etree import ElementTree

from detectron2.structures import BoxMode

from ...errors import DataError
from .checks import check_records

__all__ = ["load_voc", "voc_classes", "voc_splits"]


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
            objects = _parse(folder, image).iter("object")
            names |= {_text(folder, image, node, "name") for node in objects}
    return sorted(names)


def load_voc(folder: Path, split: str, classes: list[str]) -> list[dict]:
    """Records of a split.

    VOC counts pixels from 1 and includes the last one: a box from 1 to 10 covers the first ten.
    Objects marked ``difficult`` are treated like COCO's crowds: not learned, no fault if detected
    or missed.

    Raises:
        DataError: if a file is missing or broken, or an object is of an unknown class.
    """
    labels = {name: index for index, name in enumerate(classes)}
    records = []
    for number, image in enumerate(_images_of(folder, split), start=1):
        root = _parse(folder, image)
        size = {key: int(_text(folder, image, root, f"size/{key}")) for key in ("height", "width")}
        name = root.findtext("filename") or f"{image}.jpg"
        path = folder / "JPEGImages" / name
        if not path.suffix or not path.is_file():
            path = folder / "JPEGImages" / f"{image}.jpg"
        annotations = []
        for node in root.iter("object"):
            label = _text(folder, image, node, "name")
            if label not in labels:
                _refuse(folder, image, f"has the class {label!r}, known are {', '.join(classes)}")
            edges = ("xmin", "ymin", "xmax", "ymax")
            x1, y1, x2, y2 = (float(_text(folder, image, node, f"bndbox/{e}")) for e in edges)
            annotations.append(
                {
                    "bbox": [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1],
                    "bbox_mode": BoxMode.XYWH_ABS,
                    "category_id": labels[label],
                    "iscrowd": int(node.findtext("difficult") or 0),
                }
            )
        record = {"file_name": str(path), **size, "image_id": number, "annotations": annotations}
        records.append(record)
    check_records(records, str(_list_of(folder, split)), str(folder / "JPEGImages"))
    return records


def _list_of(folder: Path, split: str) -> Path:
    return folder / "ImageSets/Main" / f"{split}.txt"


def _images_of(folder: Path, split: str) -> list[str]:
    path = _list_of(folder, split)
    if not path.is_file():
        raise DataError(
            f"{path} does not exist; the splits of {folder} are {', '.join(voc_splits(folder))}."
        )
    return [line.split()[0] for line in path.read_text().splitlines() if line.strip()]


def _parse(folder: Path, image: str) -> ElementTree.Element:
    path = folder / "Annotations" / f"{image}.xml"
    try:
        return ElementTree.parse(path).getroot()
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist; add it or take {image} off the list.") from error
    except ElementTree.ParseError as error:
        raise DataError(f"{path} is not valid XML ({error}); export it again.") from error


def _text(folder: Path, image: str, node: ElementTree.Element, key: str) -> str:
    text = node.findtext(key)
    if not text:
        _refuse(folder, image, f"lacks {key} in <{node.tag}>")
    return text.strip()


def _refuse(folder: Path, image: str, what: str) -> NoReturn:
    raise DataError(f"{folder / 'Annotations' / image}.xml {what}; correct it.")
