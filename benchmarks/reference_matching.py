"""Dynamic label assignment written down plainly: image by image, stage by stage.

The mathematics of `OptimalTransportMatcher` with its default settings, as the papers state it:
focal losses over all classes, a cost for background, one Sinkhorn loop on logarithms per problem.
A second method for tests, and what the batched matcher is measured against.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou, generalized_box_iou, sigmoid_focal_loss

from dsrcnn.modeling.matching import UnitRule, decide_rescaled, limit_positives
from dsrcnn.structures import Predictions, Targets

__all__ = ["assign_by_loop"]


@torch.no_grad()
def assign_by_loop(
    predictions: Predictions,
    targets: Targets,
    rule: UnitRule,
    *,
    epsilon: float = 0.1,
    iterations: int = 50,
) -> Tensor:
    """What `OptimalTransportMatcher` gives with its default settings.

    Args:
        predictions: with focal classification.
        targets: of the batch.
        rule: its number of stages, ``top_q``, ``unit_step`` and cap count.
        epsilon: strength of the entropy.
        iterations: sweeps.

    Returns:
        (Q, B, P) int64.

    Raises:
        ValueError: if `rule` sets anything else.
    """
    plain = UnitRule(
        rule.num_stages,
        top_q=rule.top_q,
        unit_step=rule.unit_step,
        max_positive_fraction=rule.max_positive_fraction,
    )
    if rule != plain:
        raise ValueError(f"The plain loop does not know all settings of {rule}.")
    found = []
    for logits_of_set, boxes_of_set, stage in zip(*predictions[:3], strict=True):
        for image, (logits, boxes) in enumerate(zip(logits_of_set, boxes_of_set, strict=True)):
            real = targets.mask[image]
            objects, labels = targets.boxes[image][real], targets.labels[image][real]
            offset = rule.unit_step * (rule.num_stages - 1 - int(stage))
            size = targets.sizes[image]
            found.append(
                _assign(logits, boxes, objects, labels, size, rule, offset, epsilon, iterations)
            )
    return torch.stack(found).view(predictions.boxes.shape[:3])


def _assign(
    logits: Tensor,
    boxes: Tensor,
    objects: Tensor,
    labels: Tensor,
    size: Tensor,
    rule: UnitRule,
    offset: float,
    epsilon: float,
    iterations: int,
) -> Tensor:
    """One image at one stage: (P,)."""
    proposals, classes = logits.shape
    count = len(objects)
    if count == 0:
        return logits.new_full((proposals,), -1, dtype=torch.int64)
    wanted = F.one_hot(labels, classes).to(logits.dtype)
    expanded = logits.expand(count, proposals, classes)
    focal = {"alpha": 0.25, "gamma": 2.0, "reduction": "none"}
    as_object = sigmoid_focal_loss(expanded, wanted.unsqueeze(1).expand_as(expanded), **focal).sum(
        dim=-1
    )
    as_background = sigmoid_focal_loss(logits, torch.zeros_like(logits), **focal).sum(dim=-1)
    l1 = torch.cdist(objects / size, boxes / size, p=1)
    cost = 2 * as_object + 5 * l1 - 2 * generalized_box_iou(objects, boxes)
    cost = torch.cat([cost, 2 * as_background.unsqueeze(0)])
    limit = rule.max_positives(proposals)
    units = _units(box_iou(objects, boxes), rule, offset, limit)
    supply = torch.cat([units, proposals - units.sum(dim=0, keepdim=True)])
    plan = _sinkhorn(cost, supply, epsilon, iterations)
    return limit_positives(decide_rescaled(plan), plan, limit)


def _units(iou: Tensor, rule: UnitRule, offset: float, limit: int) -> Tensor:
    fit = iou.topk(min(rule.top_q, iou.shape[1]), dim=1).values.sum(dim=1).tolist()
    wanted = [f - offset for f in fit]
    total = sum(max(w, 0.0) for w in wanted)
    if total > limit:
        wanted = [w * limit / total for w in wanted]
    units = [max(1, math.floor(w + 1e-4)) for w in wanted]
    if len(units) > limit:  # one each for those that fit best
        best = sorted(range(len(fit)), key=lambda i: -fit[i])[:limit]
        units = [int(i in best) for i in range(len(fit))]
    elif sum(units) > limit:  # less beyond the first
        factor = (limit - len(units)) / (sum(units) - len(units))
        units = [1 + math.floor((u - 1) * factor + 1e-4) for u in units]
    return torch.tensor(units, dtype=iou.dtype, device=iou.device)


def _sinkhorn(cost: Tensor, supply: Tensor, epsilon: float, iterations: int) -> Tensor:
    u, v = torch.zeros_like(supply), torch.zeros_like(cost[0])
    for _ in range(iterations):
        v = -epsilon * torch.logsumexp((u.unsqueeze(1) - cost) / epsilon, dim=0)
        u = epsilon * (supply.log() - torch.logsumexp((v - cost) / epsilon, dim=1))
    return ((u.unsqueeze(1) + v - cost) / epsilon).exp()
