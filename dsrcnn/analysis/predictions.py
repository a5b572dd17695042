"""Predictions of a trained model beside ground truth."""

from pathlib import Path

from detectron2.config import CfgNode

from ..data.images import read_image
from ..visualization.draw import draw_comparison, evenly_spaced
from .images import load_predictor, load_records, save_image


def draw_predictions(
    cfg: CfgNode, output: str | Path, *, images: int = 8, threshold: float = 0.3
) -> list[Path]:
    """Draw images of the first test set: ground truth on the left, predictions on the right.

    Scores below `threshold` are not drawn; evaluation has no threshold.
    """
    records, classes = load_records(cfg, "TEST")
    predictor = load_predictor(cfg)
    files = []
    for index in evenly_spaced(len(records), images):
        record = dict(records[index])
        image = read_image(record, "BGR")
        detections = predictor(image)["instances"].to("cpu")
        picture = draw_comparison(image, record, detections, classes, threshold)
        name = f"{index:05d}_{Path(record['file_name']).stem}.png"
        files.append(save_image(Path(output) / name, picture))
    return files
