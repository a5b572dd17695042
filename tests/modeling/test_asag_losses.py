"""Matching, weights and losses of ASAG, against numbers of the published code and by hand."""

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torchvision.ops import generalized_box_iou

from dsrcnn.modeling.asag.anchor_generator import FixedLevels, ProbedLevel
from dsrcnn.modeling.asag.criterion import (
    ASAGCriterion,
    MatchedTargets,
    detection_losses,
    location_losses,
    match,
    matched_overlaps,
    matching_costs,
    quality_focal_loss,
    query_weights,
    weighted_box_losses,
    weighted_class_loss,
)
from dsrcnn.modeling.asag.patches import RelativeTargets
from dsrcnn.structures import Predictions, Targets, TermWeights, box_cxcywh_to_xyxy

COSTS = TermWeights(2.0, 5.0, 2.0)


@pytest.mark.parametrize(("score", "iou", "positive", "negative"), [
    (0.5, 0.5, 0.7130, 0.5897), (0.9, 0.9, 0.9738, 0.1302), (0.1, 0.3, 0.3648, 0.4093),
    (0.5, 0.1, 0.3616, 0.7229), (1.0, 1.0, 1.0, 0.0), (1.0, 0.0, 0.1915, 0.8085),
])  # fmt: skip
def test_query_weights(score, iou, positive, negative):
    weights = query_weights(torch.tensor(score), torch.tensor(iou))
    assert [x.item() for x in weights] == pytest.approx([positive, negative], abs=1e-4)


def test_query_weights_are_monotone_and_without_gradient():
    grid = torch.linspace(0, 1, 21)
    scores, ious = torch.meshgrid(grid, grid, indexing="ij")
    positive, negative = query_weights(scores.requires_grad_(), ious)
    assert not positive.requires_grad
    assert (positive.diff(dim=0) >= 0).all()
    assert (positive.diff(dim=1) >= 0).all()
    assert (negative.diff(dim=1) <= 1e-6).all()
    assert negative[:, -1].abs().max() < 1e-6


def ground_truths(*boxes):
    """Ground truths of class 0 in one image, as fractions of it."""
    shape = (1, len(boxes))
    boxes = torch.tensor(boxes).view(*shape, 4)
    return RelativeTargets(boxes, torch.zeros(shape).long(), torch.ones(shape).bool())


@pytest.mark.parametrize(("size", "weight", "inverse"), [
    ((0.1, 0.1), 3.7, 1.3), ((0.5, 0.5), 2.5, 2.5), ((1, 1), 1, 4), ((0.04, 0.01), 3.94, 1.06),
])  # fmt: skip
def test_area_weights(size, weight, inverse):
    targets = ground_truths([0.5, 0.5, *size])
    assert targets.area_weight().item() == pytest.approx(weight)
    assert targets.area_weight(inverse=True).item() == pytest.approx(inverse)


def test_class_loss():
    logits = torch.tensor([[0.0, 2], [-1, 1]])
    matched = torch.tensor([[False, True], [False, False]])
    weights = torch.tensor([0.8, 0.0]), torch.tensor([0.3, 0.0]), torch.tensor([2.0, 1.0])
    loss = weighted_class_loss(logits, matched, *weights).flatten().tolist()
    assert loss == pytest.approx([0.173287, 1.479242, 0.022658, 0.701868], abs=1e-5)


def test_quality_focal_loss():
    logits, quality = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([0.7, 0.2, 0.6])
    matched, ignored = torch.tensor([True, False, False]), torch.tensor([False, False, True])
    loss = quality_focal_loss(logits, quality, matched, ignored, torch.tensor([2.0, 1.0, 1.0]))
    assert loss.sum().item() == pytest.approx(0.030163, abs=1e-5)
    assert loss[2] == 0


def problem(predictions=6, counts=(2, 1), classes=3, seed=0):
    """Random predictions and ground truths of some images."""
    generator = torch.Generator().manual_seed(seed)
    images, most = len(counts), max(counts)
    logits = torch.randn(images, predictions, classes, generator=generator)
    boxes = torch.rand(images, predictions, 4, generator=generator) * 0.4 + 0.1
    target_boxes = torch.rand(images, most, 4, generator=generator) * 0.4 + 0.1
    labels = torch.randint(classes, (images, most), generator=generator)
    mask = torch.arange(most) < torch.tensor(counts).unsqueeze(1)
    return logits, boxes, RelativeTargets(target_boxes, labels, mask)


def test_published_matching_costs():
    logits = torch.tensor([[[0.0, 1], [2, -1], [-1, 0.5]]])
    boxes = torch.tensor([[[0.3, 0.4, 0.2, 0.2], [0.6, 0.6, 0.3, 0.3], [0.32, 0.38, 0.2, 0.25]]])
    targets = ground_truths([0.3, 0.4, 0.2, 0.1], [0.6, 0.5, 0.5, 0.6])
    targets = targets._replace(labels=torch.tensor([[1, 0]]))
    weight = targets.area_weight()
    costs = matching_costs(logits, boxes, targets, weight, COSTS)[0]
    expected = [[-5.511903, 19.012001, -0.591955], [13.136512, -0.174912, 13.439659]]
    torch.testing.assert_close(costs, torch.tensor(expected), rtol=1e-5, atol=1e-5)
    matched = match(logits, boxes, targets, weight, COSTS)
    assert matched.positive.tolist() == [[True, True, False]]
    assert torch.equal(matched.boxes[0, :2], targets.boxes[0])
    assert matched.labels[0, :2].tolist() == [1, 0]


def test_padded_predictions_are_never_matched_and_have_no_loss():
    logits, boxes, targets = problem()
    padded_logits = torch.cat([logits, torch.full((2, 3, 3), 9.0)], dim=1)
    perfect = torch.cat([boxes, targets.boxes[:, :1].expand(-1, 3, -1)], dim=1)
    losses = []
    for sets in ((logits, boxes), (padded_logits, perfect)):
        valid = torch.arange(sets[0].shape[1]).expand(2, -1) < 6
        matched = match(*sets, targets, targets.area_weight(), COSTS, valid)
        losses.append(detection_losses(*sets, matched, valid))
    torch.testing.assert_close(*losses)


def test_padding_stays_unmatched_with_more_ground_truths_than_predictions():
    logits, boxes, targets = problem(predictions=4, counts=(5, 5))
    valid = torch.tensor([[True, True, False, False]] * 2)
    matched = match(logits, boxes, targets, targets.area_weight(), COSTS, valid)
    assert torch.equal(matched.positive, valid)


@pytest.mark.parametrize(("weight", "first"), [([1.0, 4.0], 1), ([4.0, 1.0], 0)])
def test_the_ground_truth_with_the_larger_weight_gets_a_contested_prediction(weight, first):
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.2], [0.6, 0.6, 0.2, 0.2]]])
    targets = ground_truths([0.5, 0.5, 0.2, 0.2], [0.51, 0.51, 0.2, 0.2])
    matched = match(torch.zeros(1, 2, 1), boxes, targets, torch.tensor([weight]), COSTS)
    assert torch.equal(matched.boxes[0, 0], targets.boxes[0, first])


def test_predictions_that_are_not_finite_are_matched_last_and_get_no_gradient():
    logits, boxes, targets = problem(counts=(2, 2))
    logits[0, 0], boxes[0, 1] = float("nan"), float("inf")
    matched = match(logits, boxes, targets, targets.area_weight(), COSTS)
    assert not matched.positive[0, :2].any()
    boxes.requires_grad_()
    _, l1, giou = detection_losses(logits, boxes, matched, torch.ones(2, 6, dtype=torch.bool))
    (l1 + giou).sum().backward()
    assert torch.isfinite(l1).all()
    assert torch.isfinite(boxes.grad).all()


@pytest.mark.parametrize("padded", [True, False])
def test_without_ground_truths_everything_is_background(padded):
    logits, boxes, targets = problem(counts=(0, 0) if not padded else (1, 1))
    targets = targets._replace(mask=torch.zeros_like(targets.mask))
    weight = targets.area_weight()
    matched = match(logits, boxes, targets, weight, COSTS)
    class_, l1, giou = detection_losses(logits, boxes, matched, torch.ones(2, 6).bool())
    entropy = torch.nn.functional.softplus(logits) * logits.sigmoid() ** 2
    torch.testing.assert_close(class_, entropy.sum(dim=(1, 2)))
    assert not l1.any()
    assert not giou.any()
    assert not location_losses(logits[..., 0], boxes, targets, weight, COSTS)[2].any()


def test_matching_has_the_least_cost_in_every_problem():
    logits, boxes, targets = problem(predictions=5, counts=(3, 2), classes=1)
    matched = match(logits, boxes, targets, torch.ones(2, 3), COSTS)
    for image, count in enumerate((3, 2)):
        p = logits[image].sigmoid()
        positive = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log()
        classes = positive - 0.75 * p**2 * -(1 - p + 1e-8).log()
        predicted, target = boxes[image], targets.boxes[image, :count]
        giou = generalized_box_iou(box_cxcywh_to_xyxy(predicted), box_cxcywh_to_xyxy(target))
        cost = 2 * classes + 5 * torch.cdist(predicted, target, p=1) - 2 * giou
        for row, column in zip(*linear_sum_assignment(cost.numpy()), strict=True):
            assert torch.equal(matched.boxes[image, row], target[column])


def test_gradients_of_box_losses_equal_finite_differences():
    _, boxes, targets = problem(predictions=3)
    positive = torch.tensor([[True, True, False], [False, True, False]])
    weight = torch.full((2, 3), 2.0, dtype=torch.double)
    target_boxes = targets.boxes[:, [0, 1, 0]].double()
    matched = MatchedTargets(positive, torch.zeros(2, 3).long(), target_boxes, weight)

    def losses(boxes):
        _, giou = matched_overlaps(boxes, matched)
        return sum(weighted_box_losses(boxes, giou, matched, torch.ones_like(weight)))

    assert torch.autograd.gradcheck(losses, boxes.double().requires_grad_())


def targets_of(*counts):
    """Ground truths of images of 100 x 80 pixels."""
    most = max(counts)
    boxes = torch.tensor([10.0, 10, 40, 30]).expand(len(counts), most, 4)
    mask = torch.arange(most) < torch.tensor(counts).unsqueeze(1)
    sizes = torch.tensor([100.0, 80, 100, 80]).expand(len(counts), 4)
    return Targets(boxes, torch.zeros(len(counts), most, dtype=torch.int64), mask, sizes)


CRITERION = ASAGCriterion(weights=TermWeights())


def test_losses_of_parts_sum_to_those_of_the_batch():
    targets = targets_of(3, 1)
    logits, boxes = torch.randn(3, 2, 5, 4), torch.rand(3, 2, 5, 4) * 20
    boxes[..., 2:] += boxes[..., :2] + 5
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    assignment = torch.tensor([[0, 1, 2, 0, -1], [0, 0, 0, 0, 0]])
    patches = torch.rand(2, 7, 3, 5)  # of P5, of P6, two probed ones
    parts = [Targets(*(x[i : i + 1] for x in targets)) for i in range(2)]
    normalizers = CRITERION.normalizers([CRITERION.count(x) for x in parts])
    assert (normalizers.num_targets, normalizers.num_images) == (4, 2)

    def losses(images, targets):
        sets = Predictions(logits[:, images], boxes[:, images], torch.arange(3))
        result = CRITERION.of_detections(sets, mask[images], targets, normalizers)
        result |= CRITERION.of_denoising(sets, assignment[images], targets, normalizers)
        quarters, whole, probed = patches[images].split((4, 1, 2), dim=1)
        image = torch.arange(len(targets.mask)).repeat_interleave(2)
        level = ProbedLevel(probed.flatten(0, 1), image, image.new_zeros(4, 2)[image], 8, image < 0)
        return result | CRITERION.of_anchors(
            FixedLevels(quarters, whole), [level], targets, normalizers
        )

    first, second = (losses(slice(i, i + 1), part) for i, part in enumerate(parts))
    for name, value in losses(slice(None), targets).items():
        torch.testing.assert_close(first[name] + second[name], value)


def test_denoising_queries_reconstruct_the_assigned_ground_truth():
    boxes = torch.tensor([[[10.0, 10, 40, 30], [50, 50, 90, 70]]])
    targets = targets_of(2)._replace(boxes=boxes)
    predicted = torch.cat([boxes.flip(1), torch.tensor([[[0.0, 0, 1, 1]]])], dim=1).unsqueeze(0)
    sets = Predictions(torch.zeros(1, 1, 3, 1), predicted, torch.arange(1))
    normalizers = CRITERION.normalizers([CRITERION.count(targets)])

    def losses(sets, assignment):
        return CRITERION.of_denoising(sets, torch.tensor([assignment]), targets, normalizers)

    right = losses(sets, [1, 0, -1])
    assert right["dn_loss_giou_0"] == pytest.approx(0.0, abs=1e-6)
    assert losses(sets, [0, 1, -1])["dn_loss_giou_0"] > 0.1
    other = sets._replace(logits=torch.tensor([0.0, 0.0, 5.0]).view(1, 1, 3, 1))  # of the padding
    assert torch.equal(losses(other, [1, 0, -1])["dn_loss_ce_0"], right["dn_loss_ce_0"])


def test_all_probed_patches_weigh_as_much_as_four():
    targets = targets_of(1)
    fixed = FixedLevels(torch.rand(1, 4, 3, 5), torch.rand(1, 1, 3, 5))
    predictions = torch.rand(1, 3, 5)
    normalizers = CRITERION.normalizers([CRITERION.count(targets)])

    def loss(patches):
        images = torch.zeros(patches, dtype=torch.int64)
        positions = torch.zeros(patches, 2, dtype=torch.int64)
        level = ProbedLevel(predictions.expand(patches, -1, -1), images, positions, 8, images > 0)
        probed = [level] if patches else []
        return CRITERION.of_anchors(fixed, probed, targets, normalizers)["loss_ce_anchor"]

    torch.testing.assert_close(loss(1), loss(7))
    assert loss(1) > loss(0)
