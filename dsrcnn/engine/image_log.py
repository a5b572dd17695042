"""Predictions on fixed images of the test set, for TensorBoard."""

import logging

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.events import EventStorage
from torch import nn

from ..data.mapper import DetectionMapper, read_image

__all__ = ["PredictionImages"]

_LOGGER = logging.getLogger(__name__)


class PredictionImages:
    """Draws ground truth and predictions of the same images every time."""

    def __init__(self, cfg: CfgNode, *, count: int = 4, threshold: float = 0.3) -> None:
        """Choose the images.

        Args:
            cfg: for the first of ``DATASETS.TEST``.
            count: how many, spread evenly over it.
            threshold: smallest score that is drawn.
        """
        self.cfg = cfg
        self.name = cfg.DATASETS.TEST[0]
        self.count = count
        self.threshold = threshold

    def __call__(self, model: nn.Module, storage: EventStorage) -> None:
        """Draw with `model` into `storage`, from where the writers take it."""
        try:
            from .pictures import picture_of, spread
        except ImportError:  # without the extra "viz"
            _LOGGER.warning('Images are not logged: pip install "dsrcnn[viz]", or LOG.IMAGES 0.')
            return
        records = DatasetCatalog.get(self.name)
        classes = MetadataCatalog.get(self.name).thing_classes
        mapper = DetectionMapper(self.cfg, is_train=False)
        training = model.training
        model.eval()
        for index in spread(len(records), self.count):
            with torch.no_grad():
                found = model([mapper(records[index])])[0]["instances"].to("cpu")
            image = read_image(dict(records[index]), "BGR")
            picture = picture_of(image, records[index], found, classes, self.threshold)
            storage.put_image(f"predictions/{index}", picture[..., ::-1].transpose(2, 0, 1).copy())
        model.train(training)
