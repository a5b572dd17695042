"""Faster R-CNN and Dynamic R-CNN as one function of tensors.

Detectron2's evaluation selects boxes by their scores, in numbers that depend on the image. Here all
shapes are fixed: what Detectron2 leaves out has the score 0 instead.

Notation: ``R`` proposals, ``C`` classes, ``K`` detections.
"""

from typing import Any

import torch
from detectron2.layers import ROIAlign
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.modeling.proposal_generator.rpn import RPN
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.structures import ImageList, Instances
from torch import Tensor

from ..errors import ExportError
from ..layers.roi_align import FeatureTable, pool_rois
from ..modeling.meta_arch.base import ImageBatch
from ..modeling.postprocessing import Detections, dense_nms, scale_to_originals
from .program import Outputs, Program

_CANDIDATES = 1000  # best pairs of a proposal and a class of an image that enter NMS
_RPN_ROUNDS = 24  # of NMS among proposals, which overlap in long chains


class TwoStageProgram(Program):
    """Proposals of a region proposal network, classified and refined once."""

    def __init__(self, model: GeneralizedRCNN, canvas: tuple[int, int], *, bgr: bool) -> None:
        """Compute the anchors; see `Program`.

        Raises:
            ExportError: for a model with more or other parts than Faster R-CNN's.
        """
        _check(model)
        super().__init__(model, canvas, bgr=bgr)
        predictor = model.roi_heads.box_predictor
        self.nms, self.limit = predictor.test_nms_thresh, predictor.test_topk_per_image
        with torch.no_grad():
            image = torch.zeros((1, 3, *self.padded), device=model.device)
            features = self._levels(model.backbone(image), model.proposal_generator.in_features)
            anchors = model.proposal_generator.anchor_generator(features)
        for level, boxes in enumerate(anchors):
            self.register_buffer(f"anchors_{level}", boxes.tensor, persistent=False)

    def detect(self, batch: ImageBatch) -> Outputs:
        """Detect objects in a batch, see `forward`."""
        with self.precision(batch.tensor.device):
            features = self.model.backbone(batch.tensor)
            proposals, is_proposal = self._propose(features, batch.sizes)
            scores, boxes = self._classify(features, proposals)
        scores = scores * is_proposal.unsqueeze(-1)
        scores, boxes, labels = self._select(scores, boxes, batch.sizes)
        selected = Detections(scores, labels, boxes, scores > 0)
        detections = scale_to_originals(selected, batch.sizes, batch.originals)
        return detections.boxes, scores * detections.kept, labels

    def evaluate(self, model: GeneralizedRCNN, record: dict[str, Any]) -> Instances:
        """Run Detectron2's evaluation; see `Program`."""
        images = model.preprocess_image([record])
        inputs = ImageList(self.pad(images.tensor), images.image_sizes)
        features = model.backbone(inputs.tensor)
        proposals, _ = model.proposal_generator(inputs, features, None)
        (instances,), _ = model.roi_heads(inputs, features, proposals, None)
        return detector_postprocess(instances, record["height"], record["width"])

    def _levels(self, features: dict[str, Tensor], names: list[str]) -> list[Tensor]:
        return [features[name] for name in names]

    def _propose(self, features: dict[str, Tensor], sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes (B, R, 4) of the best proposals, and which of them count."""
        rpn = self.model.proposal_generator
        logits, deltas = rpn.rpn_head(self._levels(features, rpn.in_features))
        kept_boxes, kept_scores = [], []
        for level, (score, delta) in enumerate(zip(logits, deltas, strict=True)):
            score = score.permute(0, 2, 3, 1).flatten(1).float()
            delta = delta.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3).float()
            count = min(rpn.pre_nms_topk[False], score.shape[1])
            score, index = score.topk(count, dim=1)
            anchors = getattr(self, f"anchors_{level}")[index]
            delta = delta.gather(1, index.unsqueeze(-1).expand(-1, -1, 4))
            boxes = _decode(rpn.box2box_transform, delta, anchors).unflatten(0, (-1, count))
            boxes = _clip(boxes, sizes)
            is_box = ((boxes[..., 2:] - boxes[..., :2]) > rpn.min_box_size).all(dim=-1)
            # Small boxes suppress nothing: what is empty overlaps nothing.
            rivals, one_class = boxes * is_box.unsqueeze(-1), torch.zeros_like(index)
            stays = dense_nms(score, one_class, rivals, rpn.nms_thresh, _RPN_ROUNDS) & is_box
            kept_boxes.append(boxes)
            kept_scores.append(score.masked_fill(~stays, -torch.inf))
        scores = torch.cat(kept_scores, dim=1)
        count = min(rpn.post_nms_topk[False], scores.shape[1])
        scores, index = scores.topk(count, dim=1)
        boxes = torch.cat(kept_boxes, dim=1).gather(1, index.unsqueeze(-1).expand(-1, -1, 4))
        return boxes, scores > -torch.inf

    def _classify(self, features: dict[str, Tensor], proposals: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (B, R, C) and boxes (B, R, C or 1, 4)."""
        heads = self.model.roi_heads
        pooler = heads.box_pooler
        levels = self._levels(features, heads.box_in_features)
        strides = tuple(round(1 / p.spatial_scale) for p in pooler.level_poolers)
        table = FeatureTable.from_levels([x.float() for x in levels], strides)
        cells, align = pooler.output_size[0], pooler.level_poolers[0]
        samples, aligned = align.sampling_ratio, align.aligned
        pooled = pool_rois(table, proposals, cells=cells, samples=samples, aligned=aligned)
        pooled = pooled.transpose(1, 2).unflatten(2, (cells, cells))
        scores, deltas = heads.box_predictor(heads.box_head(pooled))
        images, count = proposals.shape[:2]
        scores = scores.float().softmax(dim=-1)[:, :-1].unflatten(0, (images, count))
        transform = heads.box_predictor.box2box_transform
        boxes = _decode(transform, deltas.float(), proposals.flatten(0, 1))
        return scores, boxes.unflatten(0, (images, count)).unflatten(2, (-1, 4))

    def _select(self, scores: Tensor, boxes: Tensor, sizes: Tensor) -> Outputs:
        """Scores (B, K), boxes (B, K, 4) and labels (B, K) of the best detections after NMS."""
        predictor = self.model.roi_heads.box_predictor
        classes = scores.shape[-1]
        flat = scores.flatten(1)
        flat = flat * (flat > predictor.test_score_thresh)
        flat, index = flat.topk(min(_CANDIDATES, flat.shape[1]), dim=1)
        labels = index % classes
        place = index // classes if boxes.shape[2] == 1 else index
        boxes = boxes.flatten(1, 2).gather(1, place.unsqueeze(-1).expand(-1, -1, 4))
        boxes = _clip(boxes, sizes)
        flat = flat * dense_nms(flat, labels, boxes, predictor.test_nms_thresh)
        boxes, flat, labels = self.best(boxes, flat, labels)
        return flat, boxes, labels


def _decode(transform: Box2BoxTransform, deltas: Tensor, boxes: Tensor) -> Tensor:
    """Apply deltas (..., 4) or (N, 4 C) to boxes, as (N, 4) or (N, 4 C)."""
    last = deltas.shape[-1]
    decoded: Tensor = transform.apply_deltas(deltas.reshape(-1, last), boxes.reshape(-1, 4))
    return decoded


def _clip(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Clip boxes (B, N, 4) to images of the sizes (B, 4); what is not finite becomes empty."""
    return boxes.nan_to_num(0.0, 0.0, 0.0).clamp(min=0).minimum(sizes.unsqueeze(1))


def _check(model: GeneralizedRCNN) -> None:
    """Raise an `ExportError` that names the part that cannot be exported."""
    generator: Any = model.proposal_generator
    heads: Any = model.roi_heads
    reason = None
    if type(generator) is not RPN or not isinstance(heads, StandardROIHeads):
        reason = "its proposals or ROI heads are not those of Faster R-CNN"
    elif heads.mask_on or heads.keypoint_on:
        reason = "it predicts masks or keypoints, too"
    elif not isinstance(heads.box_predictor, FastRCNNOutputLayers):
        reason = "it has several box predictors"
    elif getattr(heads.box_predictor, "use_sigmoid_ce", False):  # of newer versions of Detectron2
        reason = "its classes have sigmoid scores"
    elif not _is_pooled_at_fixed_points(heads):
        reason = (
            "it pools by other than RoIAlign with MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO above "
            "0, and exported models sample a fixed number of points"
        )
    if reason is not None:
        raise ExportError(f"The model cannot be exported: {reason}.")


def _is_pooled_at_fixed_points(heads: Any) -> bool:
    pooler: Any = heads.box_pooler
    is_align = all(isinstance(level, ROIAlign) for level in pooler.level_poolers)
    samples = pooler.level_poolers[0].sampling_ratio if is_align else 0
    return samples > 0 and len(set(pooler.output_size)) == 1
