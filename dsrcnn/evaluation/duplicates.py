"""How often an object is detected more than once: what suppression is for."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_convert, box_iou

__all__ = ["duplicates_per_object", "found_objects"]


def duplicates_per_object(
    detections: Sequence[dict[str, Any]],
    annotations: Sequence[dict[str, Any]],
    *,
    score: float = 0.3,
    iou: float = 0.5,
) -> float:
    """Mean number of detections of an object beyond the first.

    A detection belongs to the object of its class and image that it overlaps most, if it overlaps
    it enough.

    Args:
        detections: COCO results: ``image_id``, ``category_id``, ``bbox`` (XYWH) and ``score``.
        annotations: COCO annotations; crowds do not count.
        score: smallest score that counts.
        iou: smallest overlap that counts.

    Returns:
        0 if no object is detected twice, or if there is none.
    """
    objects: dict[tuple[int, int], list[list[float]]] = defaultdict(list)
    found: dict[tuple[int, int], list[list[float]]] = defaultdict(list)
    for entry in annotations:
        if not entry.get("iscrowd"):
            objects[entry["image_id"], entry["category_id"]].append(entry["bbox"])
    for entry in detections:
        if entry["score"] >= score:
            found[entry["image_id"], entry["category_id"]].append(entry["bbox"])
    extra = 0
    for key, boxes in objects.items():
        if key not in found:
            continue
        first, second = (
            box_convert(torch.tensor(b, dtype=torch.float64), "xywh", "xyxy")
            for b in (found[key], boxes)
        )
        overlap, owner = box_iou(first, second).max(dim=1)
        counts = owner[overlap >= iou].bincount(minlength=len(boxes))
        extra += int((counts - 1).clamp(min=0).sum())
    return extra / max(1, sum(map(len, objects.values())))


def found_objects(
    boxes: Tensor, labels: Tensor, objects: Tensor, classes: Tensor, *, iou: float = 0.5
) -> Tensor:
    """Match detections with objects as COCO does: best score first, each with its best free object.

    Args:
        boxes: (K, 4) xyxy detections, best score first.
        labels: (K,) their classes.
        objects: (M, 4) xyxy ground truth.
        classes: (M,) its classes.
        iou: smallest overlap that counts.

    Returns:
        (M,) bool, True for objects that a detection of their class is matched with.
    """
    found = torch.zeros(len(objects), dtype=torch.bool)
    overlaps = box_iou(boxes.double(), objects.double())
    overlaps = overlaps.masked_fill(labels[:, None] != classes, 0.0)
    for row in overlaps:
        free = row.masked_fill(found, 0.0)
        if len(free) and free.max() >= iou:
            found[free.argmax()] = True
    return found
