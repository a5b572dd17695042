"""Mapping of a dataset record to a model input: reading, augmentation, tensors."""

import copy
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import detection_utils
from detectron2.data import transforms as T
from detectron2.structures import BoxMode, Instances

from ..errors import DataError
from .datasets.validate import box_fault, has_mask, to_xyxy
from .images import read_image
from .transforms.albumentations import AlbumentationsAdapter
from .transforms.build import (
    build_albumentations,
    build_augmentations,
    build_cropping,
    build_resizing,
)
from .transforms.geometric import ROUNDING, Resize


class DetectionMapper:
    """Reads an image, augments it together with its boxes and converts both to tensors.

    In training: the transforms of ``INPUT.AUG.ALBUMENTATIONS``, flips and the other augmentations
    of ``INPUT.AUG``, then a resize or, with ``INPUT.CROP.ENABLED`` and a probability of one half,
    a resize to a small size, a crop and a resize. Crowds and unusable boxes are dropped; images
    without boxes are kept. In evaluation: a resize.

    Attributes:
        augmentations: augmentations without a crop.
        image_format: channel order of the model, ``RGB`` or ``BGR``.
        crop_augmentations: used instead for half of the images; None for never.
        albumentations: applied before either list.
        use_opencv: decode with OpenCV, which is faster than Pillow.
        keep_annotations: whether to output ``instances``.
        min_visible: least fraction of a box inside the image; objects below it are dropped.
        mask_format: format of masks, "polygon" or "bitmask"; None for boxes only.
    """

    @configurable
    def __init__(
        self,
        *,
        augmentations: list[T.Augmentation],
        image_format: str,
        crop_augmentations: list[T.Augmentation] | None = None,
        albumentations: AlbumentationsAdapter | None = None,
        use_opencv: bool = False,
        keep_annotations: bool = True,
        min_visible: float = 0.0,
        mask_format: str | None = None,
    ) -> None:
        self.augmentations = augmentations
        self.crop_augmentations = crop_augmentations
        self.albumentations = albumentations
        self.image_format = image_format
        self.use_opencv = use_opencv
        self.keep_annotations = keep_annotations
        self.min_visible = min_visible
        self.mask_format = mask_format

    @classmethod
    def from_config(
        cls, cfg: CfgNode, is_train: bool = True, keep_annotations: bool | None = None
    ) -> dict[str, Any]:
        """Read ``INPUT``; `keep_annotations` defaults to `is_train`."""
        node = cfg.INPUT
        common = {
            "image_format": node.FORMAT,
            "keep_annotations": is_train if keep_annotations is None else keep_annotations,
            "mask_format": node.MASK_FORMAT if cfg.MODEL.MASK_ON else None,
        }
        if not is_train:
            resize = T.ResizeShortestEdge(node.MIN_SIZE_TEST, node.MAX_SIZE_TEST, "choice")
            return {"augmentations": [Resize(resize)], **common}
        first = build_augmentations(cfg)
        return {
            "augmentations": [*first, *build_resizing(cfg)],
            "crop_augmentations": [*first, *build_cropping(cfg)] if node.CROP.ENABLED else None,
            "albumentations": build_albumentations(cfg),
            "use_opencv": node.OPENCV,
            "min_visible": node.AUG.MIN_VISIBLE,
            **common,
        }

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        """Map a record of Detectron2's format without modifying it; training needs ``annotations``.

        Returns:
            The record with ``image`` (3, H, W) uint8 and, with `keep_annotations`, ``instances``.

        Raises:
            DataError: if the image is missing, broken or of another size than recorded.
        """
        record = copy.deepcopy(record)
        image = read_image(record, self.image_format, self.use_opencv)
        annotations = [
            self._prepare(annotation, *image.shape[:2])
            for annotation in record.pop("annotations", [])
            if self.keep_annotations
            and annotation.get("iscrowd", 0) == 0
            and box_fault(annotation, *image.shape[:2]) is None
        ]
        if self.mask_format and not all(map(has_mask, annotations)):
            raise DataError(
                f"Image {record['file_name']} has objects without usable segmentation, which "
                "MODEL.MASK_ON needs. Write MODEL.MASK_ON False, or use data with masks."
            )
        if self.albumentations is not None:
            try:
                image, annotations = self.albumentations(image, annotations)
            except DataError as error:
                raise DataError(f"Image {record['file_name']}: {error}") from error
        augmentations = self.augmentations
        if self.crop_augmentations is not None and np.random.rand() <= 0.5:
            augmentations = self.crop_augmentations
        augmented = T.AugInput(image)
        transforms = T.AugmentationList(augmentations)(augmented)
        image = augmented.image
        record["image"] = torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))
        if self.keep_annotations:
            size = image.shape[:2]
            visible = [a for a in annotations if self._is_visible(a, transforms, *size)]
            try:
                instances = self._make_instances(visible, transforms, size)
            except Exception as error:  # Detectron2 explains masks of the other format
                if not self.mask_format or isinstance(error, ImportError):
                    raise
                text = " ".join(str(error).split())
                raise DataError(
                    f"Image {record['file_name']} has a mask that cannot be used: {text}"
                ) from error
            record["instances"] = detection_utils.filter_empty_instances(instances)
        return record

    def _make_instances(
        self, annotations: list[dict], transforms: T.TransformList, size: tuple[int, int]
    ) -> Instances:
        """Transform annotations to the objects of an image of `size` (height, width)."""
        transform = detection_utils.transform_instance_annotations
        transformed = [transform(a, transforms, size) for a in annotations]
        mask_format = self.mask_format or "polygon"
        return detection_utils.annotations_to_instances(transformed, size, mask_format)

    def _prepare(self, annotation: dict, height: int, width: int) -> dict:
        """Copy an annotation without unused fields, and clip its box to the image.

        The box is clipped before the image is transformed, since pixels outside of it do not
        exist. It becomes floats: Detectron2 would truncate a resized box of integers.
        """
        unused = ("keypoints",) if self.mask_format else ("segmentation", "keypoints")
        kept = {k: v for k, v in annotation.items() if k not in unused}
        x1, y1, x2, y2 = to_xyxy(annotation)
        clipped = [max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))]
        return {**kept, "bbox": clipped, "bbox_mode": BoxMode.XYXY_ABS}

    def _is_visible(
        self, annotation: dict, transforms: T.TransformList, height: int, width: int
    ) -> bool:
        """Check that enough of a box is inside the transformed image."""
        if not self.min_visible:
            return True
        box = transforms.apply_box(np.array([annotation["bbox"]]))[0]
        clipped = np.clip(box, 0, [width, height] * 2)
        area, visible = ((b[2] - b[0]) * (b[3] - b[1]) for b in (box, clipped))
        return bool(visible >= self.min_visible * area * (1 - ROUNDING))
