"""A training set whose images are sometimes made of several."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.structures import Boxes, Instances

from .augmentation.combining import Sample, copy_paste, mixup, mosaic
from .stream import Draw, SeededDataset, seeded

__all__ = ["CombinedDataset"]


class CombinedDataset(SeededDataset):
    """Mosaic, MixUp and copy-paste of images that the mapper has augmented each by itself.

    Which images are combined, and how, follows from the seed of the draw. Draws of the last part
    of a training ask for none of it, so that the end sees images as they are.
    """

    @configurable
    def __init__(
        self,
        records: Sequence[dict[str, Any]],
        mapper: Callable[[dict[str, Any]], dict[str, Any]],
        *,
        mosaic: float = 0.0,
        mosaic_size: int = 640,
        mosaic_scale: tuple[float, float] = (0.5, 1.5),
        mosaic_translate: float = 0.1,
        min_visible: float = 0.2,
        mixup: float = 0.0,
        mixup_alpha: float = 8.0,
        copy_paste: float = 0.0,
        objects: int = 3,
        max_covered: float = 0.7,
        fill: Sequence[float] = (0, 0, 0),
    ) -> None:
        """Set probabilities and strengths.

        Args:
            records: in Detectron2's format.
            mapper: record to model input.
            mosaic: probability.
            mosaic_size: side of a mosaic in pixels.
            mosaic_scale: its smallest and largest zoom.
            mosaic_translate: its shift as a share of its size.
            min_visible: an object is left out of a mosaic if less of its box is seen.
            mixup: probability.
            mixup_alpha: of the weight's Beta distribution.
            copy_paste: probability.
            objects: that are pasted at most.
            max_covered: objects of which more is covered by pasted ones are left out.
            fill: colour where there is no image.
        """
        super().__init__(records, mapper)
        self.mosaic, self.mosaic_size = mosaic, mosaic_size
        self.mosaic_scale, self.mosaic_translate = mosaic_scale, mosaic_translate
        self.min_visible, self.max_covered = min_visible, max_covered
        self.mixup, self.mixup_alpha = mixup, mixup_alpha
        self.copy_paste, self.objects = copy_paste, objects
        self.fill = fill

    @classmethod
    def from_config(cls, cfg: CfgNode, records: Sequence[Any], mapper: Any) -> dict[str, Any]:
        """Read `INPUT.AUG`."""
        aug = cfg.INPUT.AUG
        return {
            "records": records,
            "mapper": mapper,
            "mosaic": aug.MOSAIC.PROB,
            "mosaic_size": aug.MOSAIC.SIZE,
            "mosaic_scale": tuple(aug.MOSAIC.SCALE),
            "mosaic_translate": aug.MOSAIC.TRANSLATE,
            "min_visible": aug.MIN_VISIBLE or 0.2,
            "mixup": aug.MIXUP.PROB,
            "mixup_alpha": aug.MIXUP.ALPHA,
            "copy_paste": aug.COPY_PASTE.PROB,
            "objects": aug.COPY_PASTE.OBJECTS,
            "max_covered": aug.COPY_PASTE.MAX_COVERED,
            "fill": cfg.MODEL.PIXEL_MEAN,
        }

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        """Map the drawn record, and combine it with others if it is to be."""
        with seeded(draw.seed):
            mapped = self.mapper(self.records[draw.record])
            return self._combined(mapped) if draw.combine else mapped

    def _combined(self, mapped: dict[str, Any]) -> dict[str, Any]:
        wanted = np.random.rand(3) < (self.mosaic, self.copy_paste, self.mixup)
        if not wanted.any():
            return mapped
        sample = _sample_of(mapped)
        if wanted[0]:
            others = [self._another() for _ in range(3)]
            sample = mosaic(
                [sample, *others],
                self.mosaic_size,
                scale=self.mosaic_scale,
                translate=self.mosaic_translate,
                min_visible=self.min_visible,
                fill=self.fill,
            )
        if wanted[1]:
            other = self._another()
            sample = copy_paste(sample, other, objects=self.objects, max_covered=self.max_covered)
        if wanted[2]:
            sample = mixup(sample, self._another(), alpha=self.mixup_alpha, fill=self.fill)
        return {**mapped, **_as_input(sample)}

    def _another(self) -> Sample:
        return _sample_of(self.mapper(self.records[np.random.randint(len(self.records))]))


def _sample_of(mapped: dict[str, Any]) -> Sample:
    instances = mapped["instances"]
    boxes = instances.gt_boxes.tensor.numpy().astype(float)
    image = mapped["image"].numpy().transpose(1, 2, 0)
    return Sample(image, boxes, instances.gt_classes.numpy())


def _as_input(sample: Sample) -> dict[str, Any]:
    instances = Instances(sample.image.shape[:2])
    instances.gt_boxes = Boxes(torch.as_tensor(sample.boxes, dtype=torch.float32).reshape(-1, 4))
    instances.gt_classes = torch.as_tensor(sample.labels, dtype=torch.int64)
    image = torch.as_tensor(np.ascontiguousarray(sample.image.transpose(2, 0, 1)))
    return {"image": image, "instances": instances}
