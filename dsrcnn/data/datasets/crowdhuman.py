"""CrowdHuman (arXiv 1805.00123): its annotations as COCO json, and its data sets by name."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from tqdm import tqdm

from ...errors import DataError
from .coco import load_checked_coco_json
from .validate import read_lines, shown_size

__all__ = ["convert_crowdhuman", "register_crowdhuman"]

_BOXES = ("fbox", "vbox", "hbox")
# Annotations and images of each split, below the folder of data sets.
_FILES = {
    "crowdhuman_train": ("crowdhuman/annotations/train.json", "crowdhuman/CrowdHuman_train"),
    "crowdhuman_val": ("crowdhuman/annotations/val.json", "crowdhuman/CrowdHuman_val"),
}


def convert_crowdhuman(
    odgt: str | Path, images: str | Path, output: str | Path, *, box: str = "fbox"
) -> dict[str, int]:
    """Write the annotations of a split as a COCO json.

    Regions to ignore become crowds: not learned, no fault if detected or missed. Sizes are those of
    the image files; boxes are not clipped, as bodies may reach out of an image.

    Args:
        odgt: one image a line, in JSON, as published.
        images: folder of ``<ID>.jpg``.
        output: file to write.
        box: "fbox", the whole body, "vbox", what is seen of it, or "hbox", the head.

    Returns:
        Numbers of images, persons and regions to ignore.

    Raises:
        DataError: if a file is missing or broken, or `box` is none of the three.
    """
    if box not in _BOXES:
        raise DataError(f"box is {box!r}; write one of {', '.join(_BOXES)}.")
    if not Path(odgt).is_file():
        raise DataError(f"Annotation file {str(odgt)!r} does not exist; check the path.")
    content: dict[str, list] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 1, "name": "person"}],
    }
    lines = [line for line in read_lines(Path(odgt)) if line.strip()]
    for number, line in enumerate(tqdm(lines, desc="converting"), start=1):
        entry = _parsed(line, odgt, number)
        path = Path(images) / f"{entry['ID']}.jpg"
        try:
            width, height = shown_size(path)
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(
                f"Image {path} of {odgt}, line {number}, cannot be read: {error}"
            ) from error
        image = {"id": number, "file_name": path.name, "width": width, "height": height}
        content["images"].append(image)
        for person in _annotations_of(entry["gtboxes"], box, f"{odgt}, line {number}"):
            place = {"id": len(content["annotations"]) + 1, "image_id": number}
            content["annotations"].append({**place, **person})
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    Path(output).write_text(json.dumps(content))
    ignored = sum(a["iscrowd"] for a in content["annotations"])
    persons = len(content["annotations"]) - ignored
    return {"images": len(lines), "persons": persons, "ignored": ignored}


def _parsed(line: str, odgt: str | Path, number: int) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise DataError(f"{odgt}, line {number} is not valid JSON ({error}).") from error
    if not (isinstance(entry, dict) and "ID" in entry and isinstance(entry.get("gtboxes"), list)):
        raise DataError(f"{odgt}, line {number} lacks ID or gtboxes; it is no CrowdHuman file.")
    return entry


def _annotations_of(people: Iterable[Any], box: str, where: str) -> Iterable[dict[str, Any]]:
    for person in people:
        ignored = person.get("extra", {}).get("ignore", 0) == 1
        if box == "hbox":  # a head may be one to ignore by itself
            ignored = ignored or person.get("head_attr", {}).get("ignore", 0) == 1
        if box not in person or len(person[box]) != 4:
            raise DataError(f"{where}: a person lacks {box} with four numbers.")
        x, y, w, h = (float(v) for v in person[box])
        entry = {"bbox": [x, y, w, h], "area": w * h, "iscrowd": int(ignored), "category_id": 1}
        yield {**entry, "bbox_vis": person.get("vbox")}


def register_crowdhuman() -> None:
    """Register ``crowdhuman_train`` and ``crowdhuman_val`` below ``DETECTRON2_DATASETS``."""
    root = Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()
    for name, (annotations, images) in _FILES.items():
        if name in DatasetCatalog.list():
            continue
        json_file, image_root = str(root / annotations), str(root / images)
        DatasetCatalog.register(
            name, lambda j=json_file, i=image_root, n=name: load_checked_coco_json(j, i, n)
        )
        MetadataCatalog.get(name).set(
            json_file=json_file,
            image_root=image_root,
            evaluator_type="crowdhuman",
            thing_classes=["person"],
        )
