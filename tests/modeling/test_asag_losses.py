"""Matching and losses of ASAG: what holds besides the published numbers."""

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from dsrcnn.modeling.asag import ASAGCriterion, FixedLevels, Objects, ProbedLevel
from dsrcnn.modeling.asag.criterion import (
    Learned,
    anchor_losses,
    area_weight,
    detection_losses,
    match,
    matching_costs,
)
from dsrcnn.structures import Predictions, Targets, TermWeights

COSTS = TermWeights(2.0, 5.0, 2.0)


def problem(predictions=6, counts=(2, 1), classes=3, seed=0):
    """Random predictions and objects of some images."""
    generator = torch.Generator().manual_seed(seed)
    images, most = len(counts), max(counts)
    logits = torch.randn(images, predictions, classes, generator=generator)
    boxes = torch.rand(images, predictions, 4, generator=generator) * 0.4 + 0.1
    wanted = torch.rand(images, most, 4, generator=generator) * 0.4 + 0.1
    labels = torch.randint(classes, (images, most), generator=generator)
    mask = torch.arange(most) < torch.tensor(counts).unsqueeze(1)
    return logits, boxes, Objects(wanted, labels, mask)


def test_the_published_matching_cost():
    logits = torch.tensor([[[0.0, 1], [2, -1], [-1, 0.5]]])
    boxes = torch.tensor([[[0.3, 0.4, 0.2, 0.2], [0.6, 0.6, 0.3, 0.3], [0.32, 0.38, 0.2, 0.25]]])
    wanted = torch.tensor([[[0.3, 0.4, 0.2, 0.1], [0.6, 0.5, 0.5, 0.6]]])
    objects = Objects(wanted, torch.tensor([[1, 0]]), torch.ones(1, 2, dtype=torch.bool))
    weight = area_weight(wanted[..., 2:])
    found = matching_costs(logits, boxes, objects, weight, COSTS)[0]
    expected = [[-5.511903, 19.012001, -0.591955], [13.136512, -0.174912, 13.439659]]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-5)
    learned = match(logits, boxes, objects, weight, COSTS)
    assert learned.positive.tolist() == [[True, True, False]]
    assert torch.equal(learned.boxes[0, :2], wanted[0])
    assert learned.labels[0, :2].tolist() == [1, 0]


def test_padding_is_never_matched_and_changes_no_loss():
    logits, boxes, objects = problem()
    weight = area_weight(objects.boxes[..., 2:])
    valid = torch.ones(2, 6, dtype=torch.bool)
    learned = match(logits, boxes, objects, weight, COSTS, valid)
    expected = detection_losses(logits, boxes, learned, valid)
    more = torch.cat([logits, torch.full((2, 3, 3), 9.0)], dim=1)
    perfect = objects.boxes[:, :1].expand(-1, 3, -1)
    padded = torch.cat([boxes, perfect], dim=1)
    valid = torch.arange(9).expand(2, -1) < 6
    found = detection_losses(
        more, padded, match(more, padded, objects, weight, COSTS, valid), valid
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_more_objects_than_predictions_leave_the_padding_alone():
    logits, boxes, objects = problem(predictions=4, counts=(5, 5))
    valid = torch.tensor([[True, True, False, False]] * 2)
    learned = match(logits, boxes, objects, area_weight(objects.boxes[..., 2:]), COSTS, valid)
    assert torch.equal(learned.positive, valid)


def test_the_weight_of_an_object_counts_in_the_whole_cost():
    """Two objects want the same prediction; the one with the larger weight gets it."""
    logits = torch.zeros(1, 2, 1)
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.2], [0.6, 0.6, 0.2, 0.2]]])
    wanted = torch.tensor([[[0.5, 0.5, 0.2, 0.2], [0.51, 0.51, 0.2, 0.2]]])
    objects = Objects(wanted, torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2).bool())
    for weight, first in (([1.0, 4.0], 1), ([4.0, 1.0], 0)):
        learned = match(logits, boxes, objects, torch.tensor([weight]), COSTS)
        assert torch.equal(learned.boxes[0, 0], wanted[0, first])


def test_what_is_not_finite_is_matched_last_and_harms_no_gradient():
    logits, boxes, objects = problem(counts=(2, 2))
    logits[0, 0], boxes[0, 1] = float("nan"), float("inf")
    learned = match(logits, boxes, objects, area_weight(objects.boxes[..., 2:]), COSTS)
    assert not learned.positive[0, :2].any()
    boxes.requires_grad_()
    losses = detection_losses(logits, boxes, learned, torch.ones(2, 6, dtype=torch.bool))
    (losses.l1 + losses.giou).sum().backward()
    assert torch.isfinite(losses.l1).all()
    assert torch.isfinite(boxes.grad).all()


def test_without_objects_only_the_background_is_learned():
    logits, boxes, objects = problem(counts=(0, 0))
    weight = objects.boxes.new_zeros(2, 0)
    for mask in (objects, Objects(*(x[:, :0] for x in objects))):
        learned = match(logits, boxes, mask, weight, COSTS)
        losses = detection_losses(logits, boxes, learned, torch.ones(2, 6, dtype=torch.bool))
        entropy = torch.nn.functional.softplus(logits) * logits.sigmoid() ** 2
        torch.testing.assert_close(losses.class_, entropy.sum(dim=(1, 2)))
        assert not losses.l1.any()
        assert not losses.giou.any()
        anchors = anchor_losses(logits[..., 0], boxes, mask, weight, COSTS)
        assert not anchors.giou.any()


def test_without_query_weighting_a_matched_query_learns_fully():
    logits, boxes, objects = problem()
    one = torch.ones(2, 2)
    learned = match(logits, boxes, objects, one, COSTS)
    losses = detection_losses(
        logits, boxes, learned, torch.ones(2, 6, dtype=torch.bool), weighting=False
    )
    difference = (boxes - learned.boxes).abs().sum(dim=-1)
    torch.testing.assert_close(losses.l1, (difference * learned.positive).sum(dim=1))


def test_matching_is_the_cheapest_for_every_problem():
    logits, boxes, objects = problem(predictions=5, counts=(3, 2), classes=1)
    learned = match(logits, boxes, objects, torch.ones(2, 3), COSTS)
    for image, count in enumerate((3, 2)):
        p = logits[image].sigmoid()
        positive = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log()
        classes = positive - 0.75 * p**2 * -(1 - p + 1e-8).log()
        own, other = boxes[image], objects.boxes[image, :count]
        cost = 2 * classes + 5 * torch.cdist(own, other, p=1)
        for i, j in torch.cartesian_prod(torch.arange(5), torch.arange(count)).tolist():
            cost[i, j] -= 2 * giou(own[i].tolist(), other[j].tolist())
        rows, columns = linear_sum_assignment(cost.numpy())
        for row, column in zip(rows, columns, strict=True):
            assert torch.equal(learned.boxes[image, row], other[column])


def giou(a, b):
    """Of two boxes cxcywh, by hand."""
    low = [(x[0] - x[2] / 2, x[1] - x[3] / 2) for x in (a, b)]
    high = [(x[0] + x[2] / 2, x[1] + x[3] / 2) for x in (a, b)]
    sides = [max(min(high[0][k], high[1][k]) - max(low[0][k], low[1][k]), 0) for k in (0, 1)]
    hull = [max(high[0][k], high[1][k]) - min(low[0][k], low[1][k]) for k in (0, 1)]
    common = sides[0] * sides[1]
    union = a[2] * a[3] + b[2] * b[3] - common
    return common / union - (hull[0] * hull[1] - union) / (hull[0] * hull[1])


def targets(*counts):
    """Of images of 100 x 80 pixels."""
    most = max(counts)
    boxes = torch.tensor([10.0, 10, 40, 30]).expand(len(counts), most, 4)
    mask = torch.arange(most) < torch.tensor(counts).unsqueeze(1)
    sizes = torch.tensor([100.0, 80, 100, 80]).expand(len(counts), 4)
    return Targets(boxes, torch.zeros(len(counts), most, dtype=torch.int64), mask, sizes)


def criterion(**settings):
    return ASAGCriterion(
        weights=TermWeights(), anchor_weights=TermWeights(8.0, 4.0, 2.0), **settings
    )


def test_losses_of_a_batch_in_parts_add_up_to_those_of_the_whole():
    losses, wanted = criterion(), targets(3, 1)
    logits, boxes = torch.randn(3, 2, 5, 4), torch.rand(3, 2, 5, 4) * 20
    boxes[..., 2:] += boxes[..., :2] + 5
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    whole = Predictions(logits, boxes, torch.arange(3))
    parts = [Targets(*(x[i : i + 1] for x in wanted)) for i in range(2)]
    counts = losses.normalizers([losses.count(x) for x in parts])
    assert counts.objects == 4
    assert counts.images == 2
    expected = losses.of_detections(whole, mask, wanted, counts)
    noisy = torch.tensor([[0, 1, 2, 0, -1], [0, 0, 0, 0, 0]])
    expected.update(losses.of_denoising(whole, noisy, wanted, counts))
    for name, value in expected.items():
        found = 0
        for i, part in enumerate(parts):
            own = Predictions(logits[:, i : i + 1], boxes[:, i : i + 1], torch.arange(3))
            each = losses.of_detections(own, mask[i : i + 1], part, counts)
            each.update(losses.of_denoising(own, noisy[i : i + 1], part, counts))
            found = found + each[name]
        torch.testing.assert_close(found, value)


def test_denoising_losses_know_their_object_and_ignore_padding():
    wanted = targets(2)
    wanted = wanted._replace(boxes=torch.tensor([[[10.0, 10, 40, 30], [50, 50, 90, 70]]]))
    boxes = torch.tensor([[50.0, 50, 90, 70], [10, 10, 40, 30], [0, 0, 1, 1]]).view(1, 1, 3, 4)
    sets = Predictions(torch.zeros(1, 1, 3, 1), boxes, torch.arange(1))
    losses = criterion()
    counts = losses.normalizers([losses.count(wanted)])
    crossed = losses.of_denoising(sets, torch.tensor([[0, 1, -1]]), wanted, counts)
    right = losses.of_denoising(sets, torch.tensor([[1, 0, -1]]), wanted, counts)
    assert right["dn_loss_giou_0"] == pytest.approx(0.0, abs=1e-6)
    assert crossed["dn_loss_giou_0"] > 0.1
    other = sets._replace(logits=torch.tensor([0.0, 0.0, 5.0]).view(1, 1, 3, 1))
    assert torch.equal(
        losses.of_denoising(other, torch.tensor([[1, 0, -1]]), wanted, counts)["dn_loss_ce_0"],
        right["dn_loss_ce_0"],
    )


def test_probed_patches_together_weigh_as_much_as_four():
    losses, wanted = criterion(query_weighting=False), targets(1)
    fixed = FixedLevels(torch.rand(1, 4, 3, 5), torch.rand(1, 1, 3, 5))
    one = torch.rand(1, 3, 5)
    counts = losses.normalizers([losses.count(wanted)])

    def value(repeats):
        level = ProbedLevel(
            one.expand(repeats, -1, -1),
            torch.zeros(repeats, dtype=torch.int64),
            torch.zeros(repeats, 2, dtype=torch.int64),
            8,
            torch.zeros(repeats, dtype=torch.bool),
        )
        return losses.of_anchors(fixed, [level], wanted, counts)["loss_ce_anchor"]

    without = losses.of_anchors(fixed, [], wanted, counts)["loss_ce_anchor"]
    torch.testing.assert_close(value(1), value(7))
    torch.testing.assert_close(value(4) - without, value(1) - without)
    assert value(1) > without


def test_gradients_of_box_losses_are_those_of_finite_differences():
    logits, boxes, objects = problem(predictions=3, counts=(2, 1))
    boxes = boxes.double().requires_grad_()
    objects = objects._replace(boxes=objects.boxes.double())
    positive = torch.tensor([[True, True, False], [False, True, False]])
    learned = Learned(
        positive,
        torch.zeros(2, 3, dtype=torch.int64),
        objects.boxes[:, [0, 1, 0]],
        torch.full((2, 3), 2.0, dtype=torch.double),
    )

    def box_losses(x):
        valid = torch.ones(2, 3, dtype=torch.bool)
        losses = detection_losses(logits.double(), x, learned, valid, weighting=False)
        return losses.l1 + losses.giou

    assert torch.autograd.gradcheck(box_losses, boxes)
