"""From the last stage's predictions to Detectron2's `Instances`.

Letters: ``B`` images, ``P`` proposals, ``C`` classes, ``K`` detections.
"""

from typing import Any, NamedTuple

import torch
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torchvision.ops import nms

__all__ = ["Detections", "detections_of", "select_detections", "suppress_duplicates"]

_FAR = 1e5  # pixels; a diverged box farther out must not cost the others their digits


class Detections(NamedTuple):
    """The detections of a batch; shapes do not depend on what is found.

    Attributes:
        scores: (B, K) in 0..1, best first.
        classes: (B, K) int64.
        boxes: (B, K, 4) xyxy in pixels of the network input.
        kept: (B, K) bool, False for entries that are suppressed or beyond the limit.
    """

    scores: Tensor
    classes: Tensor
    boxes: Tensor
    kept: Tensor


def select_detections(
    logits: Tensor,
    boxes: Tensor,
    *,
    limit: int,
    focal: bool,
    candidates: int | None = None,
    nms_threshold: float | None = None,
    nms_class_wise: bool = True,
    sizes: Tensor | None = None,
    mask: Tensor | None = None,
) -> Detections:
    """The best detections of every image, by score, without threshold on the score.

    With focal classification a proposal may appear with several classes: the best of all P x C
    scores are kept. With softmax every proposal keeps its best class.

    Args:
        logits: (B, P, C), with softmax (B, P, C + 1).
        boxes: (B, P, 4).
        limit: detections per image, at most P are returned; negative for no other limit.
        focal: which of the two.
        candidates: scores that are looked at, with focal classification; then they, and not P, are
            the other limit, and suppression is among them. Negative: P.
        nms_threshold: of `suppress_duplicates` among the P best, before the limit; None for none.
        nms_class_wise: likewise.
        sizes: (B, 4) ``w, h, w, h``; overlaps are then those of boxes clipped to their image.
        mask: (B, P) bool, False for proposals that do not count; None for none.

    Returns:
        K = P with suppression, otherwise min(limit, P); with `candidates` they instead of P.
    """
    logits, boxes = logits.float(), boxes.float()
    most = boxes.shape[1]
    if focal:
        scores, rest = logits.sigmoid(), logits.shape[-1]
        if candidates is not None and candidates >= 0:
            most = min(candidates, scores[0].numel())
    else:
        best, best_class = logits.softmax(dim=-1)[..., :-1].max(dim=-1)
        scores, rest = best.unsqueeze(-1), 1
    if mask is not None:  # behind all others
        scores = scores.masked_fill(~mask.unsqueeze(-1), -1.0)
    allowed = min(limit, most) if limit >= 0 else most
    scores, flat = scores.flatten(1).topk(allowed if nms_threshold is None else most, dim=1)
    proposal = flat // rest
    classes = flat % rest if focal else best_class.gather(1, proposal)
    chosen = boxes.take_along_dim(proposal.unsqueeze(-1), dim=1)
    kept = scores >= 0
    scores = scores.clamp(min=0)
    if nms_threshold is not None:
        seen = chosen if sizes is None else chosen.clamp(min=0).minimum(sizes.unsqueeze(1))
        kept = kept & suppress_duplicates(
            scores, classes, seen, threshold=nms_threshold, class_wise=nms_class_wise
        )
        kept = kept & (kept.cumsum(dim=1) <= allowed)
    return Detections(scores, classes, chosen, kept)


def suppress_duplicates(
    scores: Tensor,
    classes: Tensor,
    boxes: Tensor,
    *,
    threshold: float,
    class_wise: bool = True,
) -> Tensor:
    """Suppression of duplicates (NMS), all images in one call.

    One-to-many assignment teaches proposals to be duplicates, so it needs this (Dynamic Sparse
    R-CNN, arXiv 2205.02101, with a threshold of 0.7).

    Args:
        scores: (B, K).
        classes: (B, K).
        boxes: (B, K, 4) xyxy in pixels.
        threshold: of two boxes with a larger IoU, the one with the lower score goes.
        class_wise: only boxes of the same class are duplicates.

    Returns:
        (B, K) bool, True for what stays.
    """
    # Boxes of another image or class are moved out of reach. In float64: the offsets of many
    # classes would cost float32 boxes their last digits.
    places = boxes.detach().double().nan_to_num().clamp(-_FAR, _FAR)
    image = torch.arange(len(scores), device=boxes.device).unsqueeze(1)
    cell = image * (classes.amax() + 1) + classes if class_wise else image
    moved = places + (cell * (2 * _FAR + 1)).unsqueeze(-1)  # (B, K or 1, 1) places apart
    stays = nms(moved.flatten(0, 1), scores.flatten().double(), threshold)
    kept = torch.zeros_like(scores, dtype=torch.bool).flatten()
    return kept.scatter(0, stays, torch.ones_like(stays, dtype=torch.bool)).view_as(scores)


def detections_of(
    found: Detections, index: int, network_size: tuple[int, int], record: dict[str, Any]
) -> Instances:
    """One image's detections in the pixels of the original, clipped, without empty boxes.

    Args:
        found: of the batch.
        index: of the image in it.
        network_size: height and width of the network input before padding.
        record: the model input, with ``height`` and ``width`` of the original.
    """
    kept = found.kept[index]
    detections = Instances(network_size)
    detections.pred_boxes = Boxes(torch.nan_to_num(found.boxes[index][kept]))
    detections.scores = found.scores[index][kept]
    detections.pred_classes = found.classes[index][kept]
    height, width = (
        record.get(k, s) for k, s in zip(("height", "width"), network_size, strict=True)
    )
    return detector_postprocess(detections, height, width)
