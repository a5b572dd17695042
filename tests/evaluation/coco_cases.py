"""What the tests of COCO metrics share."""

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances

from dsrcnn.data.datasets.shapes import CLASSES
from dsrcnn.evaluation import CocoEvaluator

NAME = "evaluated_in_test"
METRICS = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AP90"]
OBJECT = (0, 10.0, 10.0, 110.0, 110.0)  # 100 x 100: large, for COCO


def register(records, classes=CLASSES, name=NAME):
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).set(thing_classes=list(classes), evaluator_type="coco")


def image_of(objects, image_id=0, side=200, **extra):
    """A record with (label, x1, y1, x2, y2) as its objects."""
    return {
        "file_name": f"{image_id}.png",
        "image_id": image_id,
        "height": side,
        "width": side,
        "annotations": [
            {
                "bbox": list(box),
                "bbox_mode": BoxMode.XYXY_ABS,
                "category_id": label,
                "iscrowd": 0,
                **extra,
            }
            for label, *box in objects
        ],
    }


def output_of(record, detections):
    """Model output with (label, score, x1, y1, x2, y2) as its detections."""
    instances = Instances((record["height"], record["width"]))
    table = torch.tensor(detections, dtype=torch.float64).reshape(-1, 6)
    instances.pred_classes = table[:, 0].long()
    instances.scores = table[:, 1]
    instances.pred_boxes = Boxes(table[:, 2:])
    return {"instances": instances}


def evaluate(records, detections, **options):
    """Metrics of detections, a list per record, on the data set under test."""
    evaluator = CocoEvaluator(NAME, **options)
    evaluator.reset()
    for record, found in zip(records, detections, strict=True):
        evaluator.process([record], [output_of(record, found)])
    return evaluator.evaluate()["bbox"]


def perfect(record):
    return [(a["category_id"], 0.9, *a["bbox"]) for a in record["annotations"]]


def measured_by_hand(objects, detections, **options):
    record = image_of(objects)
    register([record], ["one", "two"])
    return evaluate([record], [detections], **options)


def jittered(record, generator):
    """Detections near the objects and elsewhere, some of another class, with random scores."""
    side = np.array([record["width"], record["height"]])
    found = []
    for annotation in record["annotations"] * 2:
        box = np.array(annotation["bbox"]).reshape(2, 2)
        spread = 0.15 * (box[1] - box[0])
        box = np.clip(box + generator.normal(0, 1, (2, 2)) * spread, 0, side)
        label = annotation["category_id"] if generator.random() < 0.8 else generator.integers(5)
        found.append((int(label), generator.random(), *np.sort(box, axis=0).ravel()))
    for _ in range(3):
        corners = np.sort(generator.uniform(0, 1, (2, 2)), axis=0) * side
        found.append((int(generator.integers(5)), generator.random(), *corners.ravel()))
    return found
