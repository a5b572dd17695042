"""Loss, statistics, labels and updates of Dynamic R-CNN against numbers by hand."""

import math

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, Instances, pairwise_iou
from detectron2.utils.events import EventStorage

from dsrcnn.modeling.roi_heads.dynamic_roi_heads import (
    DynamicFastRCNNOutputLayers,
    DynamicMatcher,
    regression_magnitudes,
    smooth_l1,
)
from dsrcnn.modeling.roi_heads.training_stats import DynamicTrainingStats

TARGETS = Boxes(torch.tensor([[0.0, 0, 100, 100], [200, 200, 300, 260]]))
_BOXES = [[10.0, 0, 110, 100], [0, 20, 100, 120], [0, 0, 100, 50], [230, 200, 330, 260]]
_BOXES += [[205, 203, 305, 263], [400, 400, 450, 450]]
PROPOSALS = Boxes(torch.cat([torch.tensor(_BOXES), TARGETS.tensor]))
IOUS = pairwise_iou(TARGETS, PROPOSALS)


@pytest.mark.parametrize(("beta", "loss", "gradient"), [
    (1.0, "0.00125 0.005 0.02 0.08 0.5 1.5", "0.05 0.1 0.2 0.4 1 1"),
    (0.5, "0.0025 0.01 0.04 0.16 0.75 1.75", "0.1 0.2 0.4 0.8 1 1"),
    (0.2, "0.00625 0.025 0.1 0.3 0.9 1.9", "0.25 0.5 1 1 1 1"),
    (0.1, "0.0125 0.05 0.15 0.35 0.95 1.95", "0.5 1 1 1 1 1"),
])  # fmt: skip
def test_smooth_l1(beta, loss, gradient):
    residuals = torch.tensor([0.05, 0.1, 0.2, 0.4, 1.0, 2.0], requires_grad=True)
    losses = [smooth_l1(x, torch.tensor(beta)).item() for x in residuals.detach()]
    assert losses == pytest.approx([float(x) for x in loss.split()])
    total = smooth_l1(residuals, torch.tensor(beta))
    assert total.item() == pytest.approx(sum(losses))
    total.backward()
    assert residuals.grad.tolist() == pytest.approx([float(x) for x in gradient.split()])


def test_smooth_l1_with_beta_zero_is_l1():
    residuals = torch.tensor([0.0, 0.5, -2.0], requires_grad=True)
    total = smooth_l1(residuals, torch.tensor(0.0))
    total.backward()
    assert total.item() == pytest.approx(2.5, abs=1e-4)
    assert residuals.grad.tolist() == pytest.approx([0, 1, -1])


@pytest.mark.parametrize(
    ("rank", "expected"),
    [(1, 1), (2, 1), (3, 0.822323), (4, 0.818182), (5, 0.666667), (6, 0.538462), (7, 0.5), (8, 0),
     (75, 0)],
)  # fmt: skip
def test_iou_statistic_by_rank(rank, expected):
    matcher = DynamicMatcher(0.4)
    matcher(IOUS)
    assert matcher.statistic(rank).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("threshold", "dynamic", "positives"), [
    (0.4, True, 7), (0.575, True, 5), (0.7, True, 4), (0.85, True, 2), (0.85, False, 7),
])  # fmt: skip
def test_labels_follow_a_dynamic_threshold(threshold, dynamic, positives):
    matcher = DynamicMatcher(0.5, dynamic=dynamic)
    matcher.begin(torch.tensor(threshold))
    _, labels = matcher(IOUS)
    assert int((labels == 1).sum()) == positives
    assert int((labels == -1).sum()) == 0  # no proposal is ignored


def test_iou_statistic_is_the_mean_over_images_and_can_exclude_ground_truths():
    matcher = DynamicMatcher(0.4, skip_last=True)
    matcher(IOUS)
    assert matcher.statistic(3).item() == pytest.approx(0.666667, abs=1e-6)
    matcher = DynamicMatcher(0.4)
    for ious in ([0.9, 0.8, 0.7, 0.6, 0.5, 0.4], [0.55, 0.45, 0.35, 0.25, 0.15, 0.05]):
        matcher(torch.tensor([ious]))
    assert matcher.statistic(2).item() == pytest.approx(0.625)
    matcher.begin(torch.tensor(0.4))
    matcher(torch.zeros(0, 5))
    assert matcher.statistic(2).isnan()
    matcher(torch.tensor([[0.7, 0.6]]))
    assert matcher.statistic(2).item() == pytest.approx(0.6)
    matcher.begin(torch.tensor(0.4))
    assert matcher.statistic(2).isnan()  # a new iteration


def test_errors_are_magnitudes_of_encoded_targets():
    transform = Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0))
    best = IOUS.argmax(dim=0)
    errors = regression_magnitudes(transform, PROPOSALS.tensor, TARGETS.tensor[best]).tolist()
    stray = errors.pop(5)
    assert errors == pytest.approx([0.5, 1.0, 2.5, 1.5, 0.5, 0, 0])
    assert stray > 70


def sampled(threshold):
    """The proposals as the heads sample them: classes 0 and 1, 80 for background."""
    instances = Instances((500, 500))
    best = IOUS.argmax(dim=0)
    foreground = IOUS.max(dim=0).values >= threshold
    instances.proposal_boxes = PROPOSALS
    instances.gt_boxes = Boxes(TARGETS.tensor[best])
    instances.gt_classes = torch.where(foreground, best, torch.tensor(80))
    return instances


def layers(**options):
    torch.manual_seed(0)
    transform = Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0))
    shape = ShapeSpec(channels=4, height=1, width=1)
    options |= {"box2box_transform": transform, "num_classes": 80}
    return DynamicFastRCNNOutputLayers(shape, **options)


@pytest.mark.parametrize(
    ("threshold", "expected"), [(0.4, [0, 0, 0.5, 0.5, 1, 1.5, 2.5, 2.5]), (0.7, [0, 0, 0.5, 0.5])]
)
def test_error_statistic_by_rank(threshold, expected):
    predictor = layers()
    predictor.begin(torch.tensor(1.0))
    with EventStorage():
        predictor.losses((torch.zeros(8, 81), torch.zeros(8, 320)), [sampled(threshold)])
    for skip_exact in (False, True):
        errors = [x for x in expected if x or not skip_exact]
        ranks = range(1, len(errors) + 1)
        values = [predictor.statistic(rank, skip_exact=skip_exact).item() for rank in ranks]
        assert values == pytest.approx(errors, abs=1e-6)


@pytest.mark.parametrize("agnostic", [False, True])
def test_box_loss_with_the_same_transition_point_equals_detectron2s(agnostic):
    options = {"smooth_l1_beta": 1.0, "cls_agnostic_bbox_reg": agnostic}
    plain, predictor = layers(dynamic=False, **options), layers(**options)
    predictions = torch.zeros(8, 81), torch.randn(8, 4 if agnostic else 320)
    losses = []
    with EventStorage():
        for beta in (1.0, 0.1):
            predictor.begin(torch.tensor(beta))
            losses.append(predictor.losses(predictions, [sampled(0.5)])["loss_box_reg"])
        expected = plain.losses(predictions, [sampled(0.5)])["loss_box_reg"]
    torch.testing.assert_close(losses[0], expected)
    assert losses[1] > losses[0]  # as in the table above


def stats(window=4, max_iou=1.0):
    return DynamicTrainingStats(window=window, warmup_iou=0.4, warmup_beta=1.0, max_iou=max_iou)


def run(module, ious, errors):
    for iou, error in zip(ious, errors, strict=True):
        module.record(torch.tensor(float(iou)), torch.tensor(float(error)))
    return module.iou_thresh.item(), module.beta.item()


NOTHING = [math.nan] * 4


@pytest.mark.parametrize(("ious", "limit", "threshold", "errors", "beta"), [
    # The median is neither the upper one, 0.8, nor the lower one, 0.6.
    ([0.5, 0.55, 0.6, 0.65], 1.0, 0.575, [0.8, 0.4, 0.6, 1.4], 0.7),
    ([0.1, 0.2, 0.3, 0.4], 1.0, 0.4, [1.2, 1.5, 1.1, 2.0], 1.0),
    ([0.9, 0.9, 1.0, 1.0], 1.0, 0.95, [0, 0, 0, 0], 1.0),  # beta would be 0: it stays
    ([math.nan, 0.6, math.nan, 0.8], 1.0, 0.7, [math.nan, 0.2, math.nan, 0.4], 0.3),
    ([0.9, 0.9, 1.0, 1.0], 0.7, 0.7, NOTHING, 1.0), (NOTHING, 1.0, 0.4, NOTHING, 1.0),
])  # fmt: skip
def test_the_threshold_is_the_mean_of_a_window_and_the_transition_point_its_median(
    ious, limit, threshold, errors, beta
):
    assert run(stats(max_iou=limit), ious, errors) == pytest.approx((threshold, beta))


def test_a_window_without_statistics_keeps_the_settings():
    module = stats()
    assert run(module, [0.6] * 4, [0.5] * 4) == pytest.approx((0.6, 0.5))
    assert run(module, NOTHING, [0.0] * 4) == pytest.approx((0.6, 0.5))


def test_settings_change_at_the_end_of_a_window_only():
    module = stats()
    thresholds = []
    for _ in range(9):
        thresholds.append(module.iou_thresh.item())
        module.record(torch.tensor(0.6), torch.tensor(0.3))
    assert thresholds == pytest.approx([0.4] * 4 + [0.6] * 5)
    assert module.iou_hist.isnan().tolist() == [[False, True, True, True]]
    assert module.step.item() == 9


def test_windows_of_another_length_start_anew_with_the_settings_kept():
    first = stats()
    run(first, [0.6] * 4 + [0.9], [0.5] * 5)
    second = stats(window=3)
    second.load_state_dict(first.state_dict())
    assert (second.iou_thresh.item(), second.beta.item()) == pytest.approx((0.6, 0.5))
    assert second.step.item() == 0
    assert run(second, [0.7] * 3, [0.4] * 3) == pytest.approx((0.7, 0.4))
