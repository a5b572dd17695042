"""Images made of several: Mosaic, MixUp, copy-paste of boxes. Random numbers are numpy's."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.structures import Boxes, Instances

from ..samplers import Draw, SeededDataset, seeded
from .geometric import WarpTransform
from .photometric import opencv

__all__ = ["CombinedDataset", "Sample", "copy_paste", "mixup", "mosaic"]


class Sample(NamedTuple):
    """An image with its objects.

    Attributes:
        image: (H, W, 3) uint8.
        boxes: (N, 4) xyxy in pixels.
        labels: (N,) int64.
    """

    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray


def mosaic(
    samples: Sequence[Sample],
    size: int,
    *,
    scale: tuple[float, float] = (0.5, 1.5),
    translate: float = 0.1,
    min_visible: float = 0.2,
    fill: Sequence[float] = (0, 0, 0),
) -> Sample:
    """Four images around a random point, seen through a window (YOLOv4, arXiv 2004.10934, 3.3).

    Each image has a longer side of `size` on a canvas of twice that; the window of `size` looks at
    the canvas with a random zoom and shift.

    Args:
        samples: four.
        size: side of the result in pixels.
        scale: smallest and largest zoom.
        translate: shift of the window as a share of `size`, either way.
        min_visible: an object is left out if less of its box is on canvas and in the window.
        fill: colour where there is no image.
    """
    canvas = np.empty((2 * size, 2 * size, 3), np.uint8)
    canvas[:] = np.round(fill)
    x, y = np.random.uniform(0.5 * size, 1.5 * size, 2).astype(int)
    boxes, whole, labels = [], [], []
    for place, sample in enumerate(samples):
        image, moved = _fitted(sample, size)
        height, width = image.shape[:2]
        # Upper left, upper right, lower left, lower right: each touches the point with a corner.
        left, top = (x - width, x)[place % 2], (y - height, y)[place // 2]
        _paste(canvas, image, left, top)
        corner = np.array([left, top, left, top])
        whole.append(moved + corner)
        boxes.append(_clipped(whole[-1], 2 * size, 2 * size))
        labels.append(sample.labels)
    zoom = np.random.uniform(*scale)
    shift = np.random.uniform(-1, 1, 2) * translate * size
    offset = size / 2 + shift - zoom * size  # the middle of the canvas comes to that of the window
    matrix = np.array([[zoom, 0, offset[0]], [0, zoom, offset[1]], [0, 0, 1]])
    window = WarpTransform(matrix, (size, size), fill)
    seen, areas = window.apply_box(np.concatenate(boxes)), _area(np.concatenate(whole)) * zoom**2
    return _cut(window.apply_image(canvas), seen, np.concatenate(labels), min_visible * areas)


def mixup(
    first: Sample, second: Sample, *, alpha: float = 8.0, fill: Sequence[float] = (0, 0, 0)
) -> Sample:
    """A weighted mean of two images with the objects of both (arXiv 1710.09412, 1902.04103).

    Args:
        first: keeps its size.
        second: resized to fit into it, at the upper left.
        alpha: the weight is drawn from Beta(alpha, alpha).
        fill: colour beside the second.
    """
    height, width = first.image.shape[:2]
    image, boxes = _fitted(second, width, height)
    other = np.empty_like(first.image)
    other[:] = np.round(fill)
    _paste(other, image, 0, 0)
    weight = np.random.beta(alpha, alpha)
    mixed = weight * first.image.astype(np.float32) + (1 - weight) * other
    return Sample(
        np.round(mixed).astype(np.uint8),
        np.concatenate([first.boxes, boxes]),
        np.concatenate([first.labels, second.labels]),
    )


def copy_paste(
    first: Sample, second: Sample, *, objects: int = 3, max_covered: float = 0.7
) -> Sample:
    """Objects of the second image, as their boxes cut them out, at random places of the first.

    Args:
        first: taken over.
        second: where objects come from.
        objects: at most so many.
        max_covered: objects of which more is covered by one pasted later are left out.
    """
    image, boxes, labels = first.image.copy(), first.boxes, first.labels
    height, width = image.shape[:2]
    for index in np.random.permutation(len(second.boxes))[:objects]:
        x1, y1, x2, y2 = np.round(second.boxes[index]).astype(int)
        patch = second.image[max(y1, 0) : y2, max(x1, 0) : x2]
        if not patch.size or patch.shape[0] >= height or patch.shape[1] >= width:
            continue
        left = np.random.randint(width - patch.shape[1])
        top = np.random.randint(height - patch.shape[0])
        pasted = np.array([left, top, left + patch.shape[1], top + patch.shape[0]], float)
        visible = _covered(boxes, pasted) <= max_covered
        _paste(image, patch, left, top)
        boxes = np.concatenate([boxes[visible], pasted[None]])
        labels = np.concatenate([labels[visible], second.labels[index : index + 1]])
    return Sample(image, boxes, labels)


def _fitted(sample: Sample, width: int, height: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Image and boxes, resized to the largest that fits."""
    own_height, own_width = sample.image.shape[:2]
    ratio = min(width / own_width, (height or width) / own_height)
    new = (max(1, int(own_width * ratio)), max(1, int(own_height * ratio)))
    image = opencv().resize(np.ascontiguousarray(sample.image), new)
    return image, sample.boxes * np.tile([new[0] / own_width, new[1] / own_height], 2)


def _paste(canvas: np.ndarray, image: np.ndarray, left: int, top: int) -> None:
    """What fits of an image onto a canvas, in place."""
    height, width = canvas.shape[:2]
    x1, y1 = max(left, 0), max(top, 0)
    x2, y2 = min(left + image.shape[1], width), min(top + image.shape[0], height)
    if x2 > x1 and y2 > y1:
        canvas[y1:y2, x1:x2] = image[y1 - top : y2 - top, x1 - left : x2 - left]


def _clipped(boxes: np.ndarray, width: int, height: int) -> np.ndarray:
    clipped: np.ndarray = np.clip(boxes, 0, [width, height, width, height])
    return clipped


def _area(boxes: np.ndarray) -> np.ndarray:
    area: np.ndarray = np.clip(boxes[:, 2:] - boxes[:, :2], 0, None).prod(axis=1)
    return area


def _covered(boxes: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Share of each box that lies under another one."""
    common = np.concatenate([np.maximum(boxes[:, :2], by[:2]), np.minimum(boxes[:, 2:], by[2:])], 1)
    share: np.ndarray = _area(common) / np.maximum(_area(boxes), 1e-9)
    return share


def _cut(image: np.ndarray, boxes: np.ndarray, labels: np.ndarray, least: np.ndarray) -> Sample:
    """Clip boxes to their image; those of which less area than `least`, or nothing, is left go."""
    height, width = image.shape[:2]
    clipped = _clipped(boxes, width, height)
    keep = (_area(clipped) >= least) & (_area(clipped) >= 1.0)
    return Sample(image, clipped[keep], labels[keep])


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
