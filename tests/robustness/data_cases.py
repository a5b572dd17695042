"""Small datasets in the layouts of COCO, YOLO and VOC, and what training and the check say."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_voc as write_voc_layout
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes, Instances
from PIL import Image

from dsrcnn.cli.main import main
from dsrcnn.data import register_coco_json
from dsrcnn.data.datasets.coco import load_checked_coco_json, read_categories
from dsrcnn.data.datasets.custom import find_split, load_split, read_folder
from dsrcnn.data.datasets.validate import raise_error, to_xyxy
from dsrcnn.evaluation import CocoEvaluator

NAME = "robust"
NAMES = ("left", "right")
BOXES = ([10, 12, 30, 25], [50, 40, 28.5, 30.5])  # of every image, xywh in 96 x 80 pixels
COUNT = 3


def coco_content() -> dict:
    """Three images with an object of either class each."""
    images, annotations = [], []
    for number in range(1, COUNT + 1):
        size = {"width": 96, "height": 80}
        images.append({"id": number, "file_name": f"{number}.jpg", **size})
        for label, box in enumerate(BOXES, start=1):
            entry = {"id": len(annotations) + 1, "image_id": number, "category_id": label}
            annotations.append({**entry, "bbox": list(box), "iscrowd": 0, "area": box[2] * box[3]})
    categories = [{"id": label, "name": name} for label, name in enumerate(NAMES, start=1)]
    return copy.deepcopy({"images": images, "annotations": annotations, "categories": categories})


def write_images(folder: Path, seed: int, count: int = COUNT) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for number in range(1, count + 1):
        pixels = rng.integers(0, 256, (80, 96, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg")


def write_coco(folder: Path, content: dict | bytes) -> Path:
    """Write the layout of COCO: the same json for both splits, other images."""
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    (folder / "annotations").mkdir(parents=True)
    for seed, split in enumerate(("train", "val")):
        write_images(folder / "images" / split, seed)
        (folder / f"annotations/instances_{split}.json").write_bytes(text)
    return folder


def write_yolo(folder: Path) -> Path:
    """Write the layout of YOLO."""
    rows = [
        f"{label} {(x + w / 2) / 96!r} {(y + h / 2) / 80!r} {w / 96!r} {h / 80!r}"
        for label, (x, y, w, h) in enumerate(BOXES)
    ]
    for seed, split in enumerate(("train", "val")):
        write_images(folder / "images" / split, seed)
        (folder / "labels" / split).mkdir(parents=True)
        for number in range(1, COUNT + 1):
            (folder / "labels" / split / f"{number}.txt").write_text("\n".join(rows))
    text = "train: images/train\nval: images/val\nnames: [left, right]\n"
    (folder / "data.yaml").write_text(text)
    return folder


def write_voc(folder: Path) -> Path:
    """Write the layout of VOC."""
    objects = [("left", 5, 5, 34, 34), ("right", 50, 20, 89, 49)]
    write_voc_layout(folder, dict.fromkeys("123", objects), {"train": ["1", "2"], "val": ["3"]})
    return folder


def load(folder: Path, split: str = "train", *, labeled: bool = True) -> list[dict]:
    """The records that a training reads."""
    if (folder / "annotations").is_dir():
        json_file = str(folder / f"annotations/instances_{split}.json")
        return load_checked_coco_json(json_file, str(folder / "images" / split), labeled=labeled)
    split = find_split(folder, split)
    classes = read_folder(folder, split, raise_error)[0]
    return load_split(folder, split, classes, labeled=labeled)


def boxes_of(records: list[dict]) -> int:
    return sum(a["iscrowd"] == 0 for r in records for a in r["annotations"])


def check(folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    """Exit status of the data check and what it prints; status 2 has one line of error."""
    status = main(["check-data", str(folder), *options])
    out, error = capsys.readouterr()
    assert ("Ready to train" in out) == (status == 0)
    assert error.count("\n") == (status == 2)
    assert error.startswith("error: ") or status != 2
    return status, out + error


def perfect_ap(folder: Path, output: Path | None = None) -> float:
    """AP of predictions that equal the ground truth of the test split."""
    json_file = str(folder / "annotations/instances_val.json")
    classes = list(read_categories(json_file).values())
    register_coco_json(NAME, json_file, str(folder / "images/val"), classes)
    records = DatasetCatalog.get(NAME)
    evaluator = CocoEvaluator(NAME, output)
    for record in records:
        objects = [a for a in record["annotations"] if a["iscrowd"] == 0]
        instances = Instances((record["height"], record["width"]))
        instances.pred_boxes = Boxes(torch.tensor([to_xyxy(a) for a in objects]).reshape(-1, 4))
        instances.pred_classes = torch.tensor([a["category_id"] for a in objects]).long()
        instances.scores = torch.full((len(objects),), 0.9)
        evaluator.process([record], [{"instances": instances}])
    return evaluator.evaluate().get("bbox", {}).get("AP", -1.0)
