"""From the last stage's predictions to Detectron2's `Instances`.

Letters: ``B`` images, ``P`` proposals, ``C`` classes.
"""

import torch
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from torch import Tensor

__all__ = ["select_detections", "to_original_size"]


def select_detections(
    logits: Tensor, boxes: Tensor, *, limit: int, focal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The best detections of every image, by score, without threshold or suppression.

    With focal classification a proposal may appear with several classes: the ``limit`` best of all
    P x C scores are kept. With softmax every proposal keeps its best class.

    Args:
        logits: (B, P, C), with softmax (B, P, C + 1).
        boxes: (B, P, 4).
        limit: detections per image, at most P are returned; negative for no other limit.
        focal: which of the two.

    Returns:
        Scores (B, K), classes (B, K) and boxes (B, K, 4), sorted by score; K = min(limit, P).
    """
    logits, boxes = logits.float(), boxes.float()
    count = min(limit, boxes.shape[1]) if limit >= 0 else boxes.shape[1]
    if focal:
        scores, flat = logits.sigmoid().flatten(1).topk(count, dim=1)
        proposal, classes = flat // logits.shape[-1], flat % logits.shape[-1]
    else:
        best, best_class = logits.softmax(dim=-1)[..., :-1].max(dim=-1)
        scores, proposal = best.topk(count, dim=1)
        classes = best_class.gather(1, proposal)
    return scores, classes, boxes.take_along_dim(proposal.unsqueeze(-1), dim=1)


def to_original_size(
    scores: Tensor,
    classes: Tensor,
    boxes: Tensor,
    network_size: tuple[int, int],
    original_size: tuple[int, int],
) -> Instances:
    """Scale one image's detections to the original pixels, clip them, drop empty boxes.

    Args:
        scores: (K,).
        classes: (K,).
        boxes: (K, 4) in pixels of the network input.
        network_size: height and width of the network input before padding.
        original_size: height and width to scale to.
    """
    detections = Instances(network_size)
    detections.pred_boxes = Boxes(torch.nan_to_num(boxes))
    detections.scores = scores
    detections.pred_classes = classes
    return detector_postprocess(detections, *original_size)
