"""Data sets, mapper and loaders; importing it registers the synthetic data sets."""

from .datasets import register_coco_json, register_crowdhuman, register_shapes, use_custom_data
from .loaders import build_test_loader, build_train_loader
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
