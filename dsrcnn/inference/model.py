"""Prediction with a model of this package or of Detectron2."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.structures import Instances
from torch import nn

from ..data.transforms.geometric import Resize
from ..errors import ConfigError
from ..modeling.meta_arch.base import SparseDetector
from ..modeling.tta import TestTimeAugmentation
from .predictor import Arrays, Predictor, Prepared, Settings, lightened
from .sources import Frame


class ModelPredictor(Predictor):
    """Predicts with a model.

    Attributes:
        cfg: config of the model.
        model: in evaluation mode.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module, classes: Sequence[str]) -> None:
        super().__init__(classes, on_cpu=cfg.MODEL.DEVICE == "cpu")
        self.cfg, self.model = cfg, model.eval()
        self._tta: nn.Module | None = None  # built when it is used first

    def _check_settings(self, settings: Settings) -> None:
        if isinstance(self.model, SparseDetector):
            return
        name = self.cfg.MODEL.META_ARCHITECTURE
        if settings.stages:
            raise ConfigError(f"stages needs a cascade; {name} has none. Leave it out.")
        if settings.max_detections is not None:
            raise ConfigError(
                f"max_detections is a setting of sparse detectors; with {name} load the model with "
                "opts=['TEST.DETECTIONS_PER_IMAGE', ...]."
            )

    def _prepare(self, frame: Frame, settings: Settings) -> Prepared:
        """Resize an image as evaluation does."""
        image = frame.image
        assert image is not None
        if self.cfg.INPUT.FORMAT == "BGR":
            image = image[..., ::-1]
        height, width = image.shape[:2]
        if not settings.tta:
            resize = Resize(self.resizing(settings.size))
            image = resize.get_transform(image).apply_image(image)
        tensor = torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))
        return lightened(Prepared(frame, {"image": tensor, "height": height, "width": width}))

    def resizing(self, size: int | None = None) -> T.ResizeShortestEdge:
        """Return the resizing of evaluation.

        Args:
            size: shorter side in pixels; None for ``INPUT.MIN_SIZE_TEST``.
        """
        node = self.cfg.INPUT
        shortest, longest = node.MIN_SIZE_TEST, node.MAX_SIZE_TEST
        if size is not None:
            longest = round(longest * size / shortest) if shortest else longest
            shortest = size
        return T.ResizeShortestEdge(shortest, longest, "choice")

    def _batch_key(self, item: Prepared) -> object:
        """Size of the network input of an image alone."""
        height, width = item.record["image"].shape[1:]
        if isinstance(self.model, SparseDetector):
            return self.model.padded_size([(height, width)])
        backbone: Any = self.model.backbone
        step = max(backbone.size_divisibility, 1)
        return -(-height // step) * step, -(-width // step) * step

    def _detect(
        self, records: list[dict[str, Any]], settings: Settings
    ) -> list[tuple[Arrays, list[Arrays] | None]]:
        with torch.inference_mode():
            if settings.tta:
                if self._tta is None:
                    self._tta = TestTimeAugmentation(self.cfg, self.model)
                outputs, by_stage = _instances(self._tta(records)), None
            else:
                outputs, by_stage = self._forward(records, settings)
        results: list[tuple[Arrays, list[Arrays] | None]] = []
        for index, instances in enumerate(outputs):
            stages = None
            if by_stage is not None:
                stages = [_to_arrays(stage[index]) for stage in by_stage]
            results.append((_to_arrays(instances), stages))
        return results

    def _forward(
        self, records: list[dict[str, Any]], settings: Settings
    ) -> tuple[list[Instances], list[list[Instances]] | None]:
        """Detections of images, and those of every stage if they are asked for."""
        model = self.model
        if not isinstance(model, SparseDetector):
            return _instances(model(records)), None
        detection = model.detection
        if settings.max_detections is not None:
            detection = replace(detection, limit=settings.max_detections)
        if not settings.stages:
            return _instances(model.inference(records, detection=detection)), None
        predictions, images = model.raw_predictions(records, all_stages=True)
        used = self.cfg.MODEL.SparseRCNN.INFERENCE_STAGES
        if used:  # the last of them is the result, as without `stages`
            predictions = predictions.of_sets(slice(used))
        by_stage = []
        for index in range(len(predictions.stage)):
            part = predictions.of_sets(slice(index, index + 1))
            by_stage.append(
                _instances(model.postprocess(part, images, records, detection=detection))
            )
        return by_stage[-1], by_stage


def _instances(outputs: list[dict[str, Any]]) -> list[Instances]:
    return [output["instances"] for output in outputs]


def _to_arrays(instances: Instances) -> Arrays:
    """Boxes (K, 4), scores (K,) and labels (K,)."""
    parts = (instances.pred_boxes.tensor.float(), instances.scores.float(), instances.pred_classes)
    boxes, scores, labels = (part.cpu().numpy() for part in parts)
    return boxes, scores, labels
