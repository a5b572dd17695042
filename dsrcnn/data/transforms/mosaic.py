"""Mosaic, MixUp and copy-paste: images made of several images. Random numbers are numpy's."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.structures import Boxes, Instances
from torch.utils.data import Dataset

from ..samplers import Draw, seeded
from .geometric import ROUNDING, WarpTransform

_MOSAIC_SCALE = (0.5, 1.5)  # smallest and largest zoom
_MOSAIC_TRANSLATE = 0.1  # largest shift, as a fraction of the size
_MOSAIC_MIN_VISIBLE = 0.2  # unless INPUT.AUG.MIN_VISIBLE is set
_MIXUP_ALPHA = 8.0  # the weight follows Beta(alpha, alpha)
_PASTED_OBJECTS = 3  # at most
_MAX_COVERED = 0.7  # objects covered by more than this fraction are dropped


class Sample(NamedTuple):
    """An image with its objects."""

    image: np.ndarray  # (H, W, 3) uint8
    boxes: np.ndarray  # (N, 4) xyxy in pixels
    labels: np.ndarray  # (N,) int64


class MixDataset(Dataset):
    """Maps records to model inputs, and mixes the results by mosaic, copy-paste and MixUp.

    An item is a function of its `Draw`: all random numbers follow from the seed, and ``mix=False``
    returns the mapped image alone, as at the end of a training run.

    Args:
        records: Detectron2's format.
        mapper: maps a record to a model input.
        mosaic: probability of a mosaic.
        mosaic_size: side of a mosaic in pixels.
        min_visible: least visible fraction of a box in a mosaic.
        copy_paste: probability of copy-paste.
        mixup: probability of MixUp.
        fill: color outside of images.
    """

    @configurable
    def __init__(
        self,
        records: Sequence[dict[str, Any]],
        mapper: Callable[[dict[str, Any]], dict[str, Any]],
        *,
        mosaic: float,
        mosaic_size: int,
        min_visible: float,
        copy_paste: float,
        mixup: float,
        fill: Sequence[float],
    ) -> None:
        self.records, self.mapper = records, mapper
        self.probabilities = (mosaic, copy_paste, mixup)
        self.mosaic_size = mosaic_size
        self.min_visible = min_visible
        self.fill = fill

    @classmethod
    def from_config(cls, cfg: CfgNode, records: Sequence[Any], mapper: Any) -> dict[str, Any]:
        """Read ``INPUT.AUG``."""
        node = cfg.INPUT.AUG
        return {
            "records": records,
            "mapper": mapper,
            "mosaic": node.MOSAIC.PROB,
            "mosaic_size": node.MOSAIC.SIZE,
            "min_visible": node.MIN_VISIBLE or _MOSAIC_MIN_VISIBLE,
            "copy_paste": node.COPY_PASTE.PROB,
            "mixup": node.MIXUP.PROB,
            "fill": cfg.MODEL.PIXEL_MEAN,
        }

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self.records)

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        """Map a record, and mix it with others if the draw says so."""
        with seeded(draw.seed):
            mapped = self.mapper(self.records[draw.record])
            return self._mix(mapped) if draw.mix else mapped

    def _mix(self, mapped: dict[str, Any]) -> dict[str, Any]:
        use_mosaic, use_copy_paste, use_mixup = np.random.rand(3) < self.probabilities
        if not (use_mosaic or use_copy_paste or use_mixup):
            return mapped
        sample = _to_sample(mapped)
        if use_mosaic:
            samples = [sample, *(self._random_sample() for _ in range(3))]
            sample = mosaic(samples, self.mosaic_size, min_visible=self.min_visible, fill=self.fill)
        if use_copy_paste:
            sample = copy_paste(sample, self._random_sample())
        if use_mixup:
            sample = mixup(sample, self._random_sample(), fill=self.fill)
        return {**mapped, **_to_model_input(sample)}

    def _random_sample(self) -> Sample:
        return _to_sample(self.mapper(self.records[np.random.randint(len(self.records))]))


def _to_sample(mapped: dict[str, Any]) -> Sample:
    instances = mapped["instances"]
    boxes = instances.gt_boxes.tensor.numpy().astype(float)
    image = mapped["image"].numpy().transpose(1, 2, 0)
    return Sample(image, boxes, instances.gt_classes.numpy())


def _to_model_input(sample: Sample) -> dict[str, Any]:
    instances = Instances(sample.image.shape[:2])
    instances.gt_boxes = Boxes(torch.as_tensor(sample.boxes, dtype=torch.float32).reshape(-1, 4))
    instances.gt_classes = torch.as_tensor(sample.labels, dtype=torch.int64)
    image = torch.as_tensor(np.ascontiguousarray(sample.image.transpose(2, 0, 1)))
    return {"image": image, "instances": instances}


def mosaic(
    samples: Sequence[Sample], size: int, *, min_visible: float, fill: Sequence[float]
) -> Sample:
    """Join four images at a random point and view them through a window (YOLOv4, 2004.10934).

    Each image is resized to a longer side of `size` and pasted with one corner at the point, on a
    canvas of twice that size and the color `fill`. The window of `size`, in pixels, has a random
    zoom and shift. Objects are dropped if less than the fraction `min_visible` of their box is on
    the canvas and in the window.
    """
    canvas = np.empty((2 * size, 2 * size, 3), np.uint8)
    canvas[:] = np.round(fill)
    x, y = np.random.uniform(0.5 * size, 1.5 * size, 2).astype(int)
    boxes, clipped, labels = [], [], []
    for place, sample in enumerate(samples):
        image, resized = _resize_to_fit(sample, size, size)
        height, width = image.shape[:2]
        # upper left, upper right, lower left, lower right
        left, top = (x - width, x)[place % 2], (y - height, y)[place // 2]
        _paste(canvas, image, left, top)
        boxes.append(resized + np.array([left, top, left, top]))
        clipped.append(_clip(boxes[-1], 2 * size, 2 * size))
        labels.append(sample.labels)
    zoom = np.random.uniform(*_MOSAIC_SCALE)
    shift = np.random.uniform(-1, 1, 2) * _MOSAIC_TRANSLATE * size
    offset = size / 2 + shift - zoom * size  # maps the center of the canvas to the window's
    matrix = np.array([[zoom, 0, offset[0]], [0, zoom, offset[1]], [0, 0, 1]])
    window = WarpTransform(matrix, (size, size), fill)
    seen = _clip(window.apply_box(np.concatenate(clipped)), size, size)
    areas = _area(np.concatenate(boxes)) * zoom**2
    keep = (_area(seen) >= min_visible * areas * (1 - ROUNDING)) & (_area(seen) >= 1.0)
    return Sample(window.apply_image(canvas), seen[keep], np.concatenate(labels)[keep])


def mixup(first: Sample, second: Sample, *, fill: Sequence[float]) -> Sample:
    """Average two images with a random weight and keep the objects of both (1710.09412).

    The second is resized to fit into the first, at the upper left, with the color `fill` around it.
    """
    height, width = first.image.shape[:2]
    image, boxes = _resize_to_fit(second, width, height)
    padded = np.empty_like(first.image)
    padded[:] = np.round(fill)
    _paste(padded, image, 0, 0)
    weight = np.random.beta(_MIXUP_ALPHA, _MIXUP_ALPHA)
    mixed = weight * first.image.astype(np.float32) + (1 - weight) * padded
    return Sample(
        np.round(mixed).astype(np.uint8),
        np.concatenate([first.boxes, boxes]),
        np.concatenate([first.labels, second.labels]),
    )


def copy_paste(target: Sample, source: Sample) -> Sample:
    """Paste the contents of a few boxes of `source` at random places of a copy of `target`."""
    image, boxes, labels = target.image.copy(), target.boxes, target.labels
    height, width = image.shape[:2]
    for index in np.random.permutation(len(source.boxes))[:_PASTED_OBJECTS]:
        x1, y1, x2, y2 = np.round(source.boxes[index]).astype(int)
        patch = source.image[max(y1, 0) : y2, max(x1, 0) : x2]
        if not patch.size or patch.shape[0] >= height or patch.shape[1] >= width:
            continue
        left = np.random.randint(width - patch.shape[1])
        top = np.random.randint(height - patch.shape[0])
        pasted = np.array([left, top, left + patch.shape[1], top + patch.shape[0]], float)
        visible = _covered_fraction(boxes, pasted) <= _MAX_COVERED
        _paste(image, patch, left, top)
        boxes = np.concatenate([boxes[visible], pasted[None]])
        labels = np.concatenate([labels[visible], source.labels[index : index + 1]])
    return Sample(image, boxes, labels)


def _resize_to_fit(sample: Sample, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Resize image and boxes to the largest size within the limits that keeps the aspect ratio."""
    old_height, old_width = sample.image.shape[:2]
    ratio = min(width / old_width, height / old_height)
    size = (max(1, int(old_width * ratio)), max(1, int(old_height * ratio)))
    image = cv2.resize(np.ascontiguousarray(sample.image), size)
    return image, sample.boxes * np.tile([size[0] / old_width, size[1] / old_height], 2)


def _paste(canvas: np.ndarray, image: np.ndarray, left: int, top: int) -> None:
    """Copy the part of an image that fits onto the canvas, in place."""
    height, width = canvas.shape[:2]
    x1, y1 = max(left, 0), max(top, 0)
    x2, y2 = min(left + image.shape[1], width), min(top + image.shape[0], height)
    if x2 > x1 and y2 > y1:
        canvas[y1:y2, x1:x2] = image[y1 - top : y2 - top, x1 - left : x2 - left]


def _clip(boxes: np.ndarray, width: int, height: int) -> np.ndarray:
    return np.clip(boxes, 0, [width, height, width, height])


def _area(boxes: np.ndarray) -> np.ndarray:
    return np.clip(boxes[:, 2:] - boxes[:, :2], 0, None).prod(axis=1)


def _covered_fraction(boxes: np.ndarray, cover: np.ndarray) -> np.ndarray:
    """Fraction of each box (N, 4) that the box `cover` (4,) overlaps."""
    low, high = np.maximum(boxes[:, :2], cover[:2]), np.minimum(boxes[:, 2:], cover[2:])
    return _area(np.concatenate([low, high], axis=1)) / np.maximum(_area(boxes), 1e-9)
