"""From a data set record to a model input, with Sparse R-CNN's augmentation."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import detection_utils
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from PIL import Image

from ..errors import DataError
from .datasets.validate import box_fault
from .transforms import (
    AlbumentationsAdapter,
    build_albumentations,
    build_augmentations,
    build_resizing,
)
from .transforms.photometric import opencv

__all__ = ["DetectionMapper", "ResizeByOpenCV", "decode_jpeg", "read_image", "use_one_thread"]

# Short sides before the random crop, fixed in DETR and Sparse R-CNN.
_SIZES_BEFORE_CROP = (400, 500, 600)


class DetectionMapper:
    """Reads an image, augments it with its boxes and makes tensors.

    In training: the transforms of ``INPUT.AUG.ALBUMENTATIONS``, a flip and what else ``INPUT.AUG``
    asks for, then either a plain resize or, with
    ``INPUT.CROP.ENABLED`` and probability one half, resize to a small size, crop, resize. Crowd
    annotations and boxes that cannot be used are left out; images without any box stay. In
    evaluation: a resize.
    """

    @configurable
    def __init__(
        self,
        *,
        augmentations: list[T.Augmentation],
        crop_augmentations: list[T.Augmentation] | None = None,
        albumentations: AlbumentationsAdapter | None = None,
        image_format: str = "RGB",
        by_opencv: bool = False,
        keep_annotations: bool = True,
        min_visible: float = 0.0,
        mask_format: str | None = None,
    ) -> None:
        """Set the two ways of augmenting.

        Args:
            augmentations: the plain way.
            crop_augmentations: taken instead half of the time; None for never.
            albumentations: applied before both.
            image_format: channel order the model expects.
            by_opencv: decode by OpenCV, which is faster.
            keep_annotations: whether ``instances`` are wanted.
            min_visible: an object is left out if less of its box remains in the image.
            mask_format: "polygon" or "bitmask" for masks; None for boxes alone.
        """
        self.augmentations = augmentations
        self.crop_augmentations = crop_augmentations
        self.albumentations = albumentations
        self.image_format = image_format
        self.by_opencv = by_opencv
        self.keep_annotations = keep_annotations
        self.min_visible = min_visible
        self.mask_format = mask_format

    @classmethod
    def from_config(
        cls, cfg: CfgNode, is_train: bool = True, keep_annotations: bool | None = None
    ) -> dict:
        """Read `INPUT`; annotations are kept in training if nothing else is said."""
        node = cfg.INPUT
        keep = is_train if keep_annotations is None else keep_annotations
        common = {"image_format": node.FORMAT, "keep_annotations": keep}
        common["mask_format"] = node.MASK_FORMAT if cfg.MODEL.MASK_ON else None
        if not is_train:
            resize = T.ResizeShortestEdge(node.MIN_SIZE_TEST, node.MAX_SIZE_TEST, "choice")
            return {"augmentations": [resize], **common}
        first, resize = build_augmentations(cfg), build_resizing(cfg)
        before = [T.ResizeShortestEdge(_SIZES_BEFORE_CROP, sample_style="choice")]
        if node.OPENCV:
            resize, before = ([ResizeByOpenCV(a) for a in part] for part in (resize, before))
        crop = None
        if node.CROP.ENABLED:
            crop = [*first, *before, T.RandomCrop(node.CROP.TYPE, node.CROP.SIZE), *resize]
        return {
            **{"augmentations": [*first, *resize], "crop_augmentations": crop},
            **{"min_visible": node.AUG.MIN_VISIBLE, "albumentations": build_albumentations(cfg)},
            **{"by_opencv": node.OPENCV, **common},
        }

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        """Map one record; the record itself is not changed.

        Args:
            record: Detectron2's format, with ``annotations`` in training.

        Returns:
            The record with ``image`` (3, H, W) uint8 and, if wanted, ``instances``.

        Raises:
            DataError: if the image is missing, broken or of another size than recorded.
        """
        record = copy.deepcopy(record)
        image = read_image(record, self.image_format, self.by_opencv)
        annotations = [
            _clipped_box(a, *image.shape[:2], keep_masks=self.mask_format is not None)
            for a in record.pop("annotations", [])
            if self.keep_annotations
            and a.get("iscrowd", 0) == 0
            and box_fault(a, *image.shape[:2]) is None
        ]
        if self.mask_format and not all("segmentation" in a for a in annotations):
            raise DataError(
                f"Image {record['file_name']} has objects without segmentation, which "
                "MODEL.MASK_ON asks for. Write MODEL.MASK_ON False, or take data with masks."
            )
        image, annotations = self._by_albumentations(image, annotations, record["file_name"])
        augmentations = self.augmentations
        if self.crop_augmentations is not None and np.random.rand() <= 0.5:
            augmentations = self.crop_augmentations
        augmented = T.AugInput(image)
        transforms = T.AugmentationList(augmentations)(augmented)
        image = augmented.image
        record["image"] = torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))
        if self.keep_annotations:
            usable = [
                detection_utils.transform_instance_annotations(a, transforms, image.shape[:2])
                for a in annotations
                if self._is_seen(a, transforms, image.shape[:2])
            ]
            instances = detection_utils.annotations_to_instances(
                usable, image.shape[:2], self.mask_format or "polygon"
            )
            record["instances"] = detection_utils.filter_empty_instances(instances)
        return record

    def _by_albumentations(
        self, image: np.ndarray, annotations: list[dict], name: str
    ) -> tuple[np.ndarray, list[dict]]:
        if self.albumentations is None:
            return image, annotations
        try:
            return self.albumentations(image, annotations)
        except DataError as error:
            raise DataError(f"Image {name}: {error}") from error

    def _is_seen(
        self, annotation: dict, transforms: T.TransformList, size: tuple[int, int]
    ) -> bool:
        """Whether enough of an object is left in the image (h, w)."""
        if not self.min_visible:
            return True
        whole = transforms.apply_box(np.array([annotation["bbox"]]))[0]
        left = np.clip(whole, 0, [size[1], size[0]] * 2)
        areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (left, whole)]
        return bool(areas[0] >= self.min_visible * areas[1])


def _clipped_box(annotation: dict, height: int, width: int, *, keep_masks: bool = False) -> dict:
    """The annotation without keypoints and masks, which would only cost time.

    The box is clipped before the image is turned or moved, as what is outside cannot be seen. It
    becomes floats: Detectron2 would cut a resized box of integers down to whole pixels.
    """
    without = ("keypoints",) if keep_masks else ("segmentation", "keypoints")
    kept = {k: v for k, v in annotation.items() if k not in without}
    box = [float(v) for v in annotation["bbox"]]
    x1, y1, x2, y2 = BoxMode.convert(box, annotation["bbox_mode"], BoxMode.XYXY_ABS)
    inside = [max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))]
    return {**kept, "bbox": inside, "bbox_mode": BoxMode.XYXY_ABS}


def read_image(record: dict[str, Any], image_format: str, by_opencv: bool = False) -> np.ndarray:
    """Read the image of a record and compare its size with the recorded one.

    Args:
        record: with ``file_name``, and ``height`` and ``width`` if known; they are added if not.
        image_format: channel order.
        by_opencv: decode whole JPEG files by OpenCV.

    Returns:
        (H, W, 3) uint8.

    Raises:
        DataError: naming the file and what is wrong with it.
    """
    name = record["file_name"]
    try:
        decoded = decode_jpeg(name, image_format) if by_opencv else None
        image = (
            detection_utils.read_image(name, format=image_format) if decoded is None else decoded
        )
        detection_utils.check_image_size(record, image)
    except FileNotFoundError as error:
        raise DataError(f"Image {name} does not exist; correct its path or remove it.") from error
    except detection_utils.SizeMismatchError as error:
        raise DataError(
            f"Image {name} is {image.shape[1]}x{image.shape[0]} pixels, but its record says "
            f"{record['width']}x{record['height']}; correct the annotations."
        ) from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(
            f"Image {name} cannot be read ({error}); replace the file or remove it."
        ) from error
    return image


def decode_jpeg(path: str | Path, image_format: str) -> np.ndarray | None:
    """Pixels of a whole JPEG file, turned as its EXIF data say; the same as Pillow's.

    Args:
        path: of the file.
        image_format: ``RGB`` or ``BGR``.

    Returns:
        (H, W, 3) uint8; None for what is left to Pillow: other formats, files that are missing, and
        those that are cut off, which OpenCV would fill up with grey.
    """
    try:
        content = Path(path).read_bytes()
    except OSError:
        return None
    whole = content[:2] == b"\xff\xd8" and content[-64:].rstrip(b"\0\r\n").endswith(b"\xff\xd9")
    if not whole or image_format not in ("RGB", "BGR"):
        return None
    cv2 = opencv()
    image: np.ndarray | None = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    if image is None or image_format == "BGR":
        return image
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB))


class ResizeByOpenCV(T.Augmentation):
    """Another augmentation that resizes, with OpenCV's interpolation.

    Means over areas where an image gets smaller, bilinear where it gets larger.
    """

    def __init__(self, augmentation: T.Augmentation) -> None:
        """Set what chooses the size, such as ``ResizeShortestEdge``."""
        super().__init__()
        self.augmentation = augmentation

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """The size that the other one chooses."""
        chosen = self.augmentation.get_transform(image)
        if not isinstance(chosen, T.ResizeTransform):
            return chosen
        return _OpenCVResize(chosen.h, chosen.w, chosen.new_h, chosen.new_w, chosen.interp)


class _OpenCVResize(T.ResizeTransform):
    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        if interp is not None or img.dtype != np.uint8:  # masks
            return np.asarray(super().apply_image(img, interp))
        cv2 = opencv()
        smaller = self.new_h * self.new_w < self.h * self.w
        how = cv2.INTER_AREA if smaller else cv2.INTER_LINEAR
        return np.asarray(cv2.resize(img, (self.new_w, self.new_h), interpolation=how))


def use_one_thread(worker: int) -> None:
    """Keep OpenCV in a loader worker from taking the threads of all others."""
    del worker
    try:
        import cv2
    except ImportError:
        return
    cv2.setNumThreads(0)  # 1 would wait for threads that the fork did not bring along
