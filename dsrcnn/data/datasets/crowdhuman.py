"""CrowdHuman (arXiv 1805.00123): conversion to COCO json, and its registered datasets."""

import json
import os
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from tqdm import tqdm

from ...errors import DataError
from ..files import read_lines
from ..images import image_file_size
from .coco import load_checked_coco_json
from .fields import as_box

_BOXES = ("fbox", "vbox", "hbox")


def register_crowdhuman() -> None:
    """Register ``crowdhuman_train`` and ``crowdhuman_val`` below ``DETECTRON2_DATASETS``.

    The official names of Sparse R-CNN, ``CrowdHuman_train`` and ``CrowdHuman_val``, mean the same.
    """
    root = Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser() / "crowdhuman"
    for prefix, split in product(("crowdhuman", "CrowdHuman"), ("train", "val")):
        name = f"{prefix}_{split}"
        if name in DatasetCatalog.list():
            continue
        json_file = str(root / f"annotations/{split}.json")
        image_root = str(root / f"CrowdHuman_{split}")
        DatasetCatalog.register(name, partial(load_checked_coco_json, json_file, image_root, name))
        paths = {"json_file": json_file, "image_root": image_root}
        metadata = {"evaluator_type": "crowdhuman", "thing_classes": ["person"]}
        MetadataCatalog.get(name).set(**paths, **metadata)


def convert_crowdhuman(
    odgt: str | Path, images: str | Path, output: str | Path, *, box: str = "fbox"
) -> dict[str, int]:
    """Convert the annotations of a split to a COCO json.

    Ignore regions become crowds: ignored in training and evaluation. Sizes are read from the image
    files. Boxes are not clipped, since bodies may extend beyond the image.

    Args:
        odgt: published annotations, one image per line.
        images: folder of ``<ID>.jpg``.
        output: file to write.
        box: "fbox" (full body), "vbox" (visible part) or "hbox" (head).

    Returns:
        Number of images, persons and ignore regions.

    Raises:
        DataError: if a file is missing or broken, or `box` is unknown.
    """
    if box not in _BOXES:
        raise DataError(f"box is {box!r}; write one of {', '.join(_BOXES)}.")
    records: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    lines = [(n, line) for n, line in enumerate(read_lines(odgt), start=1) if line.strip()]
    for number, (place, line) in enumerate(tqdm(lines, desc="converting"), start=1):
        where = f"{odgt}, line {place}"
        entry = _parse_line(line, where)
        path = Path(images) / f"{entry['ID']}.jpg"
        try:
            width, height = image_file_size(path)
        except ValueError as error:
            raise DataError(
                f"Image {path} of {where}, cannot be read ({error}); correct --images or replace "
                "the file."
            ) from error
        records.append({"id": number, "file_name": path.name, "width": width, "height": height})
        for person in _convert_persons(entry["gtboxes"], box, where):
            annotations.append({"id": len(annotations) + 1, "image_id": number, **person})
    categories = [{"id": 1, "name": "person"}]
    content = {"images": records, "annotations": annotations, "categories": categories}
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    Path(output).write_text(json.dumps(content))
    ignored = sum(a["iscrowd"] for a in annotations)
    return {"images": len(lines), "persons": len(annotations) - ignored, "ignored": ignored}


def _parse_line(line: str, where: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not valid JSON ({error}).") from error
    if not (isinstance(entry, dict) and "ID" in entry and isinstance(entry.get("gtboxes"), list)):
        raise DataError(f"{where} lacks ID or gtboxes; it is no CrowdHuman file.")
    return entry


def _convert_persons(persons: Iterable[Any], box: str, where: str) -> Iterator[dict[str, Any]]:
    for person in persons:
        try:
            ignored = (person.get("extra") or {}).get("ignore", 0) == 1
            if box == "hbox":  # heads have a flag of their own
                ignored = ignored or (person.get("head_attr") or {}).get("ignore", 0) == 1
            x, y, w, h = map(float, as_box(person[box]))
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
            raise DataError(f"{where}: a person lacks {box} with four numbers.") from None
        entry = {"bbox": [x, y, w, h], "area": w * h, "iscrowd": int(ignored)}
        yield {**entry, "category_id": 1, "bbox_vis": person.get("vbox")}
