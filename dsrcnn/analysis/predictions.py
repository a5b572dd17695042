"""Predictions of a trained model beside ground truth."""

import math
from pathlib import Path

import numpy as np
from detectron2.config import CfgNode

from ..data.images import read_image
from ..visualization.draw import draw_comparison, evenly_spaced
from .images import Report, load_predictor, load_records, save_image


def draw_predictions(
    cfg: CfgNode, output: str | Path, *, images: int = 8, threshold: float = 0.3
) -> Report:
    """Draw images of the first test set: ground truth on the left, predictions on the right.

    Scores below `threshold` are not drawn; evaluation has no threshold. Statistics are the number
    of detections drawn and the best score of all, NaN without any.
    """
    records, classes = load_records(cfg, "TEST")
    predictor = load_predictor(cfg)
    files, best = [], [math.nan]
    drawn = 0
    for index in evenly_spaced(len(records), images):
        record = dict(records[index])
        image = read_image(record, "BGR")
        detections = predictor(image)["instances"].to("cpu")
        best += detections.scores.tolist()
        drawn += int((detections.scores >= threshold).sum())
        picture = draw_comparison(image, record, detections, classes, threshold)
        name = f"{index:05d}_{Path(record['file_name']).stem}.png"
        files.append(save_image(Path(output) / name, picture))
    score = float(np.nanmax(best)) if len(best) > 1 else math.nan
    return Report(files, {"detections": drawn, "best score": score})
