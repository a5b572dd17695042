"""Datasets, mapper and loaders; importing it registers the shapes and CrowdHuman datasets."""

from .build import build_test_loader, build_train_loader
from .datasets.coco import register_coco_json
from .datasets.crowdhuman import register_crowdhuman
from .datasets.custom import use_custom_data
from .datasets.shapes import register_shapes
from .mapper import DetectionMapper

register_shapes()
register_crowdhuman()

__all__ = [
    "DetectionMapper",
    "build_test_loader",
    "build_train_loader",
    "register_coco_json",
    "use_custom_data",
]
