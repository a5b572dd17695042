"""Time of DLA's matcher, all stages and images in one call, against a loop over them."""

import argparse
import math
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor
from torchvision.ops import box_iou, generalized_box_iou, sigmoid_focal_loss

from benchmarks.speed import median_ratio, time_in_turn
from benchmarks.worker import at_least_one
from dsrcnn.modeling.matching import (
    CostSettings,
    HungarianMatcher,
    OptimalTransportMatcher,
    UnitRule,
    assign_from_plan,
    limit_positives,
)
from dsrcnn.structures import Predictions, Targets

_EPSILON, _ITERATIONS = 0.1, 50  # the defaults of `OptimalTransportMatcher`


@torch.no_grad()
def assign_by_loop(predictions: Predictions, targets: Targets, rule: UnitRule) -> Tensor:
    """Dynamic label assignment image by image and stage by stage, as the papers state it.

    Focal losses over all classes, a cost for background, one Sinkhorn loop on logarithms per
    problem: a second implementation of `OptimalTransportMatcher` with its default settings.

    Args:
        predictions: with focal classification.
        targets: of the batch.
        rule: for the units.

    Returns:
        (Q, B, P) int64.
    """
    assignments = []
    for logits_of_set, boxes_of_set, stage in zip(*predictions[:3], strict=True):
        offset = rule.unit_step * (rule.num_stages - 1 - int(stage))
        for image, (logits, boxes) in enumerate(zip(logits_of_set, boxes_of_set, strict=True)):
            real = targets.mask[image]
            objects, labels = targets.boxes[image][real], targets.labels[image][real]
            if len(objects) == 0:
                assignments.append(torch.full_like(boxes[:, 0], -1, dtype=torch.int64))
                continue
            cost = _costs(logits, boxes, objects, labels, targets.sizes[image])
            limit = rule.max_positives(len(boxes))
            units = _units(box_iou(objects, boxes), rule, offset, limit)
            supply = torch.cat([units, len(boxes) - units.sum(dim=0, keepdim=True)])
            plan = _sinkhorn(cost, supply)
            # The first unit of every object overrides the cap.
            most = torch.tensor(max(limit, len(objects)))
            assignments.append(limit_positives(assign_from_plan(plan), plan, most))
    return torch.stack(assignments).view(predictions.boxes.shape[:3])


def _costs(logits: Tensor, boxes: Tensor, objects: Tensor, labels: Tensor, size: Tensor) -> Tensor:
    """(M + 1, P) with background last."""
    focal = {"alpha": 0.25, "gamma": 2.0, "reduction": "none"}
    classes = F.one_hot(labels, logits.shape[-1]).to(logits.dtype)
    expanded = logits.expand(len(objects), *logits.shape)
    as_object = sigmoid_focal_loss(expanded, classes.unsqueeze(1).expand_as(expanded), **focal)
    as_background = sigmoid_focal_loss(logits, torch.zeros_like(logits), **focal)
    l1 = torch.cdist(objects / size, boxes / size, p=1)
    cost = 2 * as_object.sum(dim=-1) + 5 * l1 - 2 * generalized_box_iou(objects, boxes)
    return torch.cat([cost, 2 * as_background.sum(dim=-1).unsqueeze(0)])


def _units(iou: Tensor, rule: UnitRule, offset: float, limit: int) -> Tensor:
    fit = iou.topk(min(rule.top_q, iou.shape[1]), dim=1).values.sum(dim=1).tolist()
    estimates = [(rule.static_units or f) - offset for f in fit]
    total = sum(max(e, 0.0) for e in estimates)
    if total > limit:
        estimates = [e * limit / total for e in estimates]
    units = [max(1, math.floor(e + 1e-4)) for e in estimates]
    extra, room = sum(units) - len(units), max(limit - len(units), 0)
    if extra > room:  # scale down beyond the first
        units = [1 + math.floor((u - 1) * room / extra + 1e-4) for u in units]
    if len(units) > iou.shape[1]:  # 1 for those that fit best
        best = sorted(range(len(fit)), key=lambda i: -fit[i])[: iou.shape[1]]
        units = [int(i in best) for i in range(len(fit))]
    return torch.tensor(units, dtype=iou.dtype, device=iou.device)


def _sinkhorn(cost: Tensor, supply: Tensor) -> Tensor:
    u, v = torch.zeros_like(supply), torch.zeros_like(cost[0])
    for _ in range(_ITERATIONS):
        v = -_EPSILON * torch.logsumexp((u.unsqueeze(1) - cost) / _EPSILON, dim=0)
        u = _EPSILON * (supply.log() - torch.logsumexp((v - cost) / _EPSILON, dim=1))
    return ((u.unsqueeze(1) + v - cost) / _EPSILON).exp()


def make_scene(
    stages: int, images: int, proposals: int, objects: int, classes: int, device: torch.device
) -> tuple[Predictions, Targets]:
    """Predictions as of a trained model: proposals scatter around the objects."""
    g = torch.Generator().manual_seed(0)
    size = torch.tensor([640.0, 480.0])
    corner = torch.rand(images, objects, 2, generator=g) * size * 0.7
    extent = (0.05 + 0.25 * torch.rand(images, objects, 2, generator=g)) * size
    truth = torch.cat([corner, corner + extent], dim=-1)
    labels = torch.randint(classes, (images, objects), generator=g)
    index = torch.arange(proposals) % objects
    distance = torch.linspace(0, 1, proposals).view(-1, 1)
    noise = torch.randn(stages, images, proposals, 4, generator=g) * 0.3 * distance
    boxes = truth[:, index] + noise * extent[:, index].repeat(1, 1, 2)
    logits = torch.randn(stages, images, proposals, classes, generator=g) - 4.6
    strength = (4 - 4 * distance).expand(stages, images, proposals, 1)
    assigned = labels[:, index].expand(stages, images, proposals).unsqueeze(-1)
    logits = logits.scatter_add(-1, assigned, strength)
    mask = torch.ones(images, objects, dtype=torch.bool)
    sizes = size.repeat(2).expand(images, 4)
    predictions = Predictions(logits.to(device), boxes.to(device), torch.arange(stages).to(device))
    return predictions, Targets(*(x.to(device) for x in (truth, labels, mask, sizes)))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    defaults = {"stages": 6, "images": 2, "proposals": 300, "objects": 20, "repeats": 15}
    for name, value in defaults.items():
        text = f"{'rounds ' if name == 'repeats' else ''}(default: {value})"
        parser.add_argument(f"--{name}", type=at_least_one, default=value, help=text)


def run(args: argparse.Namespace) -> None:
    """Print the table; ratios are medians of those of the rounds.

    Raises:
        AssertionError: if batched matcher and loop disagree.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scene = make_scene(args.stages, args.images, args.proposals, args.objects, 80, device)
    rule = UnitRule(num_stages=args.stages)
    transport = OptimalTransportMatcher(costs=CostSettings(), units=rule)
    hungarian = HungarianMatcher(costs=CostSettings())
    differing = int((transport(*scene) != assign_by_loop(*scene, rule)).sum())
    if differing > 0.001 * scene[0].boxes[..., 0].numel():
        raise AssertionError(f"Batched matcher and loop disagree about {differing} proposals.")
    runs = {
        "transport, batched": partial(transport, *scene),
        "transport, loop": partial(assign_by_loop, *scene, rule),
        "Hungarian": partial(hungarian, *scene),
    }
    times = time_in_turn(runs, args.repeats)
    loop = times["transport, loop"]
    rows = [[name, 1000 * median(t), median_ratio(loop, t)] for name, t in times.items()]
    headers = ["matcher", "ms", "loop / this"]
    print(tabulate(rows, headers, floatfmt=("", ".1f", ".1f"), tablefmt="pipe"))
