"""Records, detections and datasets for tests of evaluators."""

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances

from dsrcnn.data.datasets.shapes import CLASSES
from dsrcnn.evaluation import CocoEvaluator

NAME = "evaluated_in_test"
METRICS = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AP90", "AR1", "AR10", "AR100"]
OBJECT = (0, 10.0, 10.0, 110.0, 110.0)  # 100 x 100: large, for COCO


def register(records, classes=CLASSES, kind="coco"):
    DatasetCatalog.register(NAME, lambda: records)
    MetadataCatalog.get(NAME).set(thing_classes=list(classes), evaluator_type=kind)


def image_of(objects, image_id=0):
    """A record of 200 x 200 pixels with objects (label, x1, y1, x2, y2)."""
    common = {"bbox_mode": BoxMode.XYXY_ABS, "iscrowd": 0}
    annotations = [{"bbox": box, "category_id": label, **common} for label, *box in objects]
    record = {"file_name": f"{image_id}.png", "image_id": image_id, "height": 200, "width": 200}
    return {**record, "annotations": annotations}


def output_of(record, detections):
    """Model output with detections (label, score, x1, y1, x2, y2)."""
    instances = Instances((record["height"], record["width"]))
    table = torch.tensor(detections, dtype=torch.float64).reshape(-1, 6)
    instances.pred_classes = table[:, 0].long()
    instances.scores = table[:, 1]
    instances.pred_boxes = Boxes(table[:, 2:])
    return {"instances": instances}


def evaluate(records, detections, output_folder=None, evaluator=None):
    """Metrics of detections, a list per record, by default by COCO on the registered dataset."""
    evaluator = evaluator or CocoEvaluator(NAME, output_folder)
    evaluator.reset()
    for record, of_image in zip(records, detections, strict=True):
        evaluator.process([record], [output_of(record, of_image)])
    return evaluator.evaluate()["bbox"]


def perfect(record):
    return [(a["category_id"], 0.9, *a["bbox"]) for a in record["annotations"]]


def evaluate_one(objects, detections, **options):
    record = image_of(objects)
    register([record], ["one", "two"])
    return evaluate([record], [detections], evaluator=CocoEvaluator(NAME, **options))


def jittered(record, generator):
    """Detections near the objects and elsewhere, some of another class, with random scores."""
    side = np.array([record["width"], record["height"]])
    detections = []
    for annotation in record["annotations"] * 2:
        box = np.array(annotation["bbox"]).reshape(2, 2)
        noise = 0.15 * generator.normal(0, 1, (2, 2)) * (box[1] - box[0])
        box = np.sort(np.clip(box + noise, 0, side), axis=0)
        label = annotation["category_id"] if generator.random() < 0.8 else generator.integers(5)
        detections.append((int(label), generator.random(), *box.ravel()))
    for _ in range(3):
        corners = np.sort(generator.uniform(0, 1, (2, 2)), axis=0) * side
        detections.append((int(generator.integers(5)), generator.random(), *corners.ravel()))
    return detections
