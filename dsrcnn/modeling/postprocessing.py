"""From the last stage's predictions to Detectron2's `Instances`.

Notation: ``K`` detections of an image.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torchvision.ops import nms

from .matching.matcher import matcher_class

_FAR = 1e5  # pixels; clamps boxes of a diverged model, which would cost the others their digits


@dataclass(frozen=True)
class DetectionSettings:
    """Settings of `select_detections`.

    Attributes:
        limit: detections per image; negative for no limit.
        focal: sigmoid scores; False for softmax with a background class.
        nms_threshold: IoU of class-wise NMS; None for no NMS.
        candidates: best scores that enter NMS with sigmoid scores; None or negative for ``P``.
        dense_nms: whether NMS is `dense_nms`, for graphs; False for the faster `batched_nms`.
    """

    limit: int = 100
    focal: bool = True
    nms_threshold: float | None = None
    candidates: int | None = None
    dense_nms: bool = False

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "DetectionSettings":
        """Read `TEST` and `MODEL.SparseRCNN`."""
        node = cfg.MODEL.SparseRCNN
        enabled = node.NMS.ENABLED
        if enabled is None:  # on where training assigns an object to several proposals
            # With recollection from the second stage on, groups are matched separately, and
            # different proposals of them get the same object.
            recollects_early = node.SQR.MODE == "dense" or node.SQR.START == 1
            is_recollected = node.SQR.ENABLED and recollects_early
            enabled = matcher_class(cfg).one_to_many or is_recollected
        threshold = node.NMS.THRESHOLD if enabled else None
        return cls(cfg.TEST.DETECTIONS_PER_IMAGE, node.USE_FOCAL, threshold)


class Detections(NamedTuple):
    """Detections of a batch; shapes do not depend on their number.

    Attributes:
        scores: (B, K) in 0..1, descending.
        classes: (B, K) int64.
        boxes: (B, K, 4) xyxy in pixels of the network input.
        kept: (B, K) bool, False for entries removed by NMS or beyond the limit.
    """

    scores: Tensor
    classes: Tensor
    boxes: Tensor
    kept: Tensor


def select_detections(
    logits: Tensor,
    boxes: Tensor,
    settings: DetectionSettings,
    *,
    sizes: Tensor | None = None,
    mask: Tensor | None = None,
) -> Detections:
    """Select the best detections of every image by score, without a score threshold.

    With sigmoid scores a proposal may appear with several classes: the best of all P x C scores are
    kept. With softmax every proposal keeps its best class.

    Args:
        logits: (B, P, C), with softmax (B, P, C + 1).
        boxes: (B, P, 4).
        settings: limits and NMS.
        sizes: (B, 4) ``w, h, w, h``; NMS then compares boxes clipped to their image.
        mask: (B, P) bool, False for padding; None for none.

    Returns:
        K = P (or `candidates`) with NMS, otherwise the smaller of it and the limit.
    """
    logits, boxes = logits.float(), boxes.float()
    most = boxes.shape[1]
    if settings.focal:
        scores, num_classes = logits.sigmoid(), logits.shape[-1]
        if settings.candidates is not None and settings.candidates >= 0:
            most = min(settings.candidates, scores[0].numel())
    else:
        best, best_class = logits.softmax(dim=-1)[..., :-1].max(dim=-1)
        scores, num_classes = best.unsqueeze(-1), 1
    if mask is not None:  # padding ranks last
        scores = scores.masked_fill(~mask.unsqueeze(-1), -1.0)
    limit = min(settings.limit, most) if settings.limit >= 0 else most
    count = limit if settings.nms_threshold is None else most
    scores, flat = scores.flatten(1).topk(count, dim=1)
    proposal = flat // num_classes
    classes = flat % num_classes if settings.focal else best_class.gather(1, proposal)
    selected = boxes.gather(1, proposal.unsqueeze(-1).expand(-1, -1, 4))
    kept = scores >= 0
    scores = scores.clamp(min=0)
    if settings.nms_threshold is not None:
        visible = selected if sizes is None else selected.clamp(min=0).minimum(sizes.unsqueeze(1))
        suppress = dense_nms if settings.dense_nms else batched_nms
        kept = kept & suppress(scores, classes, visible, settings.nms_threshold)
        kept = kept & (kept.cumsum(dim=1) <= limit)
    return Detections(scores, classes, selected, kept)


def batched_nms(scores: Tensor, classes: Tensor, boxes: Tensor, threshold: float) -> Tensor:
    """Class-wise NMS of all images, on a GPU in one call.

    One-to-many assignment teaches proposals to be duplicates, so it needs NMS (Dynamic Sparse
    R-CNN, arXiv 2205.02101, with a threshold of 0.7).

    Args:
        scores: (B, K).
        classes: (B, K).
        boxes: (B, K, 4) xyxy in pixels.
        threshold: of two boxes of a class with a larger IoU, the lower score is removed.

    Returns:
        (B, K) bool, True for what stays.
    """
    # Boxes of another image or class are moved out of reach. In float64: the offsets of many
    # classes would cost float32 boxes their last digits.
    places = boxes.detach().double().nan_to_num().clamp(-_FAR, _FAR)
    ranked = scores.detach().double()
    if places.device.type == "cpu":  # one image after another: the time is quadratic in boxes
        moved = places + (classes * (2 * _FAR + 1)).unsqueeze(-1)
        return torch.stack([_nms(*image, threshold) for image in zip(moved, ranked, strict=True)])
    image = torch.arange(len(scores), device=boxes.device).unsqueeze(1)
    cell = image * (classes.amax() + 1) + classes
    moved = places + (cell * (2 * _FAR + 1)).unsqueeze(-1)
    return _nms(moved.flatten(0, 1), ranked.flatten(), threshold).view_as(scores)


def _nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Mark what NMS leaves of boxes (N, 4), (N,) bool."""
    stays = nms(boxes, scores, threshold)
    kept = torch.zeros_like(scores, dtype=torch.bool)
    return kept.scatter(0, stays, torch.ones_like(stays, dtype=torch.bool))


_ROUNDS = 16  # of `dense_nms`


def dense_nms(
    scores: Tensor, classes: Tensor, boxes: Tensor, threshold: float, rounds: int = _ROUNDS
) -> Tensor:
    """Class-wise NMS by matrix products, of fixed shapes and without a wait of the host.

    For GPUs, which must not wait, and exported models. Every round removes what overlaps a box
    that is kept so far and has a higher score. From the best box on, a round settles at least one
    more link of every chain of overlaps, so the result is that of `batched_nms` unless a chain of
    boxes, each overlapping only the next ones, is longer than `rounds`.

    Args:
        scores: (B, K), descending; not read.
        classes: (B, K).
        boxes: (B, K, 4) xyxy in pixels.
        threshold: of two boxes of a class with a larger IoU, the lower score is removed.
        rounds: number of them.

    Returns:
        (B, K) bool, True for what stays.
    """
    places = boxes.nan_to_num().clamp(-_FAR, _FAR)
    area = (places[..., 2:] - places[..., :2]).clamp(min=0).prod(dim=-1)
    # In place: most of the time of K x K values on a CPU is that of new memory.
    x1, y1, x2, y2 = places.mT.contiguous().unbind(1)
    overlap = _shared_length(x1, x2).mul_(_shared_length(y1, y2))
    # Without a quotient, which boxes without area would not have.
    union = (area.unsqueeze(2) + area.unsqueeze(1)).sub_(overlap)
    is_rival = overlap > union.mul_(threshold)
    is_rival &= classes.unsqueeze(2) == classes.unsqueeze(1)
    rank = torch.arange(boxes.shape[1], device=boxes.device)
    suppresses = is_rival.logical_and_(rank.unsqueeze(1) < rank).float()
    kept = torch.ones_like(area)
    for _ in range(rounds):
        kept = ((kept.unsqueeze(1) @ suppresses).squeeze(1) == 0).float()
    return kept > 0


def nms_without_wait(scores: Tensor, classes: Tensor, boxes: Tensor, threshold: float) -> Tensor:
    """`batched_nms` on a CPU, where nothing waits; `dense_nms` on other devices and in graphs."""
    is_recorded = torch.jit.is_tracing() or torch.compiler.is_compiling()
    suppress = batched_nms if scores.device.type == "cpu" and not is_recorded else dense_nms
    return suppress(scores, classes, boxes, threshold)


def _shared_length(low: Tensor, high: Tensor) -> Tensor:
    """Length that every two intervals (B, K) have in common, (B, K, K)."""
    start = torch.maximum(low.unsqueeze(2), low.unsqueeze(1))
    return torch.minimum(high.unsqueeze(2), high.unsqueeze(1)).sub_(start).clamp_(min=0)


def scale_to_originals(detections: Detections, sizes: Tensor, originals: Tensor) -> Detections:
    """Scale boxes to the original images and clip them there; empty ones are not kept.

    Args:
        detections: of the batch.
        sizes: (B, 4) ``w, h, w, h`` of the network inputs before padding.
        originals: (B, 4) of the original images.
    """
    boxes = torch.nan_to_num(detections.boxes) * (originals / sizes).unsqueeze(1)
    boxes = boxes.clamp(min=0).minimum(originals.unsqueeze(1))
    is_solid = (boxes[..., 2:] > boxes[..., :2]).all(dim=-1)
    return detections._replace(boxes=boxes, kept=detections.kept & is_solid)


def to_instances(detections: Detections, index: int, size: tuple[int, int]) -> Instances:
    """Return one image's detections.

    Args:
        detections: of the batch, in pixels of the original images.
        index: of the image in the batch.
        size: height and width of the original image.
    """
    kept = detections.kept[index].nonzero().squeeze(1)  # the host waits here, once an image
    instances = Instances(size)
    instances.pred_boxes = Boxes(detections.boxes[index].index_select(0, kept))
    instances.scores = detections.scores[index].index_select(0, kept)
    instances.pred_classes = detections.classes[index].index_select(0, kept)
    return instances
