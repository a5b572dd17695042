"""Test-time augmentation: detect on several sizes and flips of an image, merge the detections.

Official Sparse R-CNN keeps detections whose size fits the scale and merges them by soft box voting
(`vote_boxes`); NMS is the alternative.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import transforms as T
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn
from torchvision.ops import batched_nms, box_iou

from ..config.validate import architecture_of
from ..data.transforms.geometric import Resize
from ..errors import ConfigError
from .meta_arch.sparse_rcnn import SparseRCNN

_Detections = tuple[Tensor, Tensor, Tensor]  # boxes, scores, classes
_SAME_OBJECT_IOU = 0.65
_MIN_MEMBER_SCORE = 0.05


def vote_boxes(
    boxes: Tensor, scores: Tensor, *, iou: float = _SAME_OBJECT_IOU
) -> tuple[Tensor, Tensor]:
    """Merge the boxes (N, 4) xyxy of one class, with scores (N,), by soft voting.

    From the best box down, a box and all that overlap it by `iou` form a group. A group of one is
    kept. Otherwise the score-weighted mean gets the best score, and the other members stay with
    scores times ``1 - IoU``, unless those become too small. The result is not sorted.
    """
    order = scores.argsort(descending=True)
    boxes, scores = boxes[order], scores[order]
    merged_boxes, merged_scores = [], []
    while len(boxes):
        overlap = box_iou(boxes[:1], boxes)[0]
        same = overlap >= iou
        same[0] = True  # an empty box overlaps nothing, not even itself
        group, weight = boxes[same], scores[same]
        if len(group) == 1:
            merged_boxes.append(group)
            merged_scores.append(weight)
        else:
            mean = (group * weight[:, None]).sum(0) / weight.sum().clamp(min=1e-12)
            lowered = weight * (1 - overlap[same])  # 0 for the best box
            kept = lowered >= _MIN_MEMBER_SCORE
            merged_boxes += [mean[None], group[kept]]
            merged_scores += [weight[:1], lowered[kept]]
        boxes, scores = boxes[~same], scores[~same]
    if not merged_boxes:
        return boxes, scores
    return torch.cat(merged_boxes), torch.cat(merged_scores)


class Views(NamedTuple):
    """Sizes and flips of an image.

    Attributes:
        min_sizes: shorter sides in pixels.
        max_size: most pixels of the longer side.
        flip: whether each size is also flipped.
    """

    min_sizes: list[int]
    max_size: int
    flip: bool

    def __call__(self, record: dict[str, Any]) -> list[dict[str, Any]]:
        """Resize the image of a model input to every size, plain and flipped.

        Returns:
            Model inputs with ``transforms`` from the original image, those of a size in a row.
        """
        image = np.ascontiguousarray(record["image"].permute(1, 2, 0).numpy())
        height, width = image.shape[:2]
        first: list[T.Transform] = []
        if (height, width) != (record["height"], record["width"]):  # it is resized already
            first = [T.ResizeTransform(record["height"], record["width"], height, width)]
        views = []
        for size in self.min_sizes:
            resize = Resize(T.ResizeShortestEdge(size, self.max_size)).get_transform(image)
            resized = resize.apply_image(image)
            flip = T.HFlipTransform(resized.shape[1])
            for last in ([], [flip])[: 1 + self.flip]:
                pixels = flip.apply_image(resized) if last else resized
                tensor = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
                transforms = T.TransformList([*first, resize, *last])
                views.append({**record, "image": tensor, "transforms": transforms})
        return views


class TestTimeAugmentation(nn.Module):
    """Detector that runs a model on several sizes of an image, plain and flipped."""

    __test__ = False  # not a test

    @configurable
    def __init__(
        self,
        *,
        model: nn.Module,
        views: Views,
        scale_ranges: list[tuple[float, float]] | None,
        limit: int,
        voting: bool,
        nms_threshold: float,
    ) -> None:
        """Wrap a model that returns detections in pixels of the given ``height`` and ``width``.

        `views` makes the augmented copies of a record. Boxes are kept if the square root of their
        area, in pixels of the augmented image, is within the range for its size; None for
        `scale_ranges` keeps all. With `voting` they are merged by `vote_boxes`, otherwise by
        class-wise NMS; at most `limit` remain per image.
        """
        super().__init__()
        self.model = model
        self.views = views
        self.scale_ranges, self.limit = scale_ranges, limit
        self.voting, self.nms_threshold = voting, nms_threshold

    @classmethod
    def from_config(cls, cfg: CfgNode, model: nn.Module) -> dict:
        """Read `TEST.AUG`.

        Raises:
            ConfigError: if sizes and scale ranges differ in number.
        """
        node = cfg.TEST.AUG
        if node.SCALE_FILTER and len(node.SCALE_RANGES) != len(node.MIN_SIZES):
            raise ConfigError(
                f"TEST.AUG.SCALE_RANGES has {len(node.SCALE_RANGES)} entries, TEST.AUG.MIN_SIZES "
                f"{len(node.MIN_SIZES)}; write one range per size, or TEST.AUG.SCALE_FILTER False."
            )
        limit = cfg.TEST.DETECTIONS_PER_IMAGE
        if issubclass(architecture_of(cfg), SparseRCNN):
            limit = min(limit, cfg.MODEL.SparseRCNN.NUM_PROPOSALS)
        return {
            "model": model,
            "views": Views(node.MIN_SIZES, node.MAX_SIZE, node.FLIP),
            "scale_ranges": list(node.SCALE_RANGES) if node.SCALE_FILTER else None,
            "limit": limit,
            "voting": node.CVPODS_TTA,
            "nms_threshold": cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST,
        }

    @torch.no_grad()
    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Instances]]:
        """Detect on every input; the format is the model's."""
        return [{"instances": self._detect(record)} for record in batched_inputs]

    def _detect(self, record: dict[str, Any]) -> Instances:
        size = (record["height"], record["width"])
        parts = [self._detect_view(index, view) for index, view in enumerate(self.views(record))]
        boxes, scores, classes = (torch.cat(x) for x in zip(*parts, strict=True))
        merge = self._vote if self.voting else self._suppress
        boxes, scores, classes = merge(boxes, scores, classes)
        best = scores.argsort(descending=True)[: self.limit]
        result = Instances(size)
        result.pred_boxes = Boxes(boxes[best])
        result.pred_boxes.clip(size)
        result.scores, result.pred_classes = scores[best], classes[best]
        return result

    def _detect_view(self, index: int, view: dict[str, Any]) -> _Detections:
        """Detections on one view, in pixels of the original image."""
        transforms = view.pop("transforms")
        view["height"], view["width"] = view["image"].shape[1:]
        detections = self.model([view])[0]["instances"].to("cpu")
        if self.scale_ranges is not None:
            low, high = self.scale_ranges[index // (1 + self.views.flip)]
            area = detections.pred_boxes.area()
            detections = detections[(area > low**2) & (area < high**2)]
        boxes = transforms.inverse().apply_box(detections.pred_boxes.tensor.numpy())
        boxes = torch.from_numpy(np.asarray(boxes, np.float32).reshape(-1, 4))
        return boxes, detections.scores, detections.pred_classes

    def _vote(self, boxes: Tensor, scores: Tensor, classes: Tensor) -> _Detections:
        labels = classes.unique()
        if not len(labels):
            return boxes, scores, classes
        parts = [vote_boxes(boxes[classes == c], scores[classes == c]) for c in labels]
        counts = torch.tensor([len(s) for _, s in parts])
        merged_boxes, merged_scores = (torch.cat(x) for x in zip(*parts, strict=True))
        return merged_boxes, merged_scores, labels.repeat_interleave(counts)

    def _suppress(self, boxes: Tensor, scores: Tensor, classes: Tensor) -> _Detections:
        kept = batched_nms(boxes, scores, classes, self.nms_threshold)
        return boxes[kept], scores[kept], classes[kept]
