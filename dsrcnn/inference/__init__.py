"""From a trained model to detections in images, folders, videos and cameras."""

from .detector import Detector, load
from .results import Result, StageDetections

__all__ = ["Detector", "Result", "StageDetections", "load"]
