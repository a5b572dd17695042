"""Which objects of an image a set of detections finds."""

import torch
from torch import Tensor
from torchvision.ops import box_iou

__all__ = ["found_objects"]


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
