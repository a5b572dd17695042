"""Datasets by name: synthetic shapes, CrowdHuman, and your own as COCO, Pascal VOC or YOLO."""

from .coco import register_coco_json
from .crowdhuman import register_crowdhuman
from .custom import class_names, resolve_num_classes, use_custom_data
from .shapes import register_shapes

__all__ = [
    "class_names",
    "register_coco_json",
    "register_crowdhuman",
    "register_shapes",
    "resolve_num_classes",
    "use_custom_data",
]
