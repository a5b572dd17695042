"""From a trained model to detections in images, folders, videos and cameras."""

from .detector import Detector, load
from .exported import ExportedDetector, load_exported
from .results import Result, StageDetections

__all__ = [
    "Detector",
    "ExportedDetector",
    "Result",
    "StageDetections",
    "load",
    "load_exported",
]
