import math

import pytest
import torch

from dsrcnn.modeling.losses import SetCriterion
from dsrcnn.modeling.matching import CostSettings, pairwise_costs
from dsrcnn.structures import Predictions, Targets, TermWeights

PRIOR_LOGIT = -4.59511985013459


def criterion(**kwargs):
    defaults = {"num_classes": 3, "num_stages": 2, "weights": TermWeights(2.0, 5.0, 2.0)}
    return SetCriterion(**{**defaults, **kwargs})


def one_image(count=1, *, sets=2, proposals=4, classes=3, outputs=None):
    """Predictions at the prior and `count` ground truths of class 1 in a 20 x 10 image."""
    logits = torch.full((sets, 1, proposals, outputs or classes), PRIOR_LOGIT)
    boxes = torch.tensor([0.0, 0, 10, 10]).expand(sets, 1, proposals, 4).clone()
    predictions = Predictions(logits.requires_grad_(), boxes.requires_grad_(), torch.arange(sets))
    gt_boxes = torch.tensor([5.0, 0, 15, 10]).expand(1, count, 4)
    labels, sizes = torch.ones(1, count, dtype=torch.int64), torch.tensor([[20.0, 10, 20, 10]])
    return predictions, Targets(gt_boxes, labels, labels.bool(), sizes)


def background(predictions):
    return torch.full(predictions.boxes.shape[:3], -1)


def test_class_loss_at_the_prior_agrees_with_hand_calculation():
    predictions, targets = one_image(0, sets=1, proposals=300, classes=80)
    losses = criterion(num_classes=80, num_stages=1)(predictions, targets, background(predictions))
    assert losses["loss_ce"].item() == pytest.approx(2 * 300 * 80 * 7.537752e-7, rel=1e-4)


@pytest.mark.parametrize("positives", [1, 3])
def test_losses_of_several_positives_agree_with_hand_calculation(positives):
    predictions, targets = one_image()
    assignment = background(predictions)
    assignment[:, 0, :positives] = 0
    losses = criterion()(predictions, targets, assignment)
    # x1 and x2 are 5 of 20 pixels off; IoU = GIoU = 1/3
    assert losses["loss_bbox"].item() == pytest.approx(positives * 5 * 0.5)
    assert losses["loss_giou"].item() == pytest.approx(positives * 2 * 2 / 3)
    positive, negative = 0.25 * 0.99**2 * -math.log(0.01), 0.75 * 0.01**2 * -math.log(0.99)
    expected = 2 * (positives * positive + (12 - positives) * negative)
    assert losses["loss_ce"].item() == pytest.approx(expected, rel=1e-4)


def test_scores_learn_the_iou_of_their_box_if_that_is_the_target():
    """IoU 1/3, score 0.01: 0.25 (1/3 - 0.01)^2 times the cross-entropy of both."""
    predictions, targets = one_image()
    assignment = background(predictions)
    assignment[:, 0, :3] = 0
    loss = criterion(class_target="iou")(predictions, targets, assignment)["loss_ce"]
    entropy = -(math.log(0.01) + 2 * math.log(0.99)) / 3
    positive, negative = 0.25 * (1 / 3 - 0.01) ** 2 * entropy, 0.75 * 0.01**2 * -math.log(0.99)
    assert loss.item() == pytest.approx(2 * (3 * positive + 9 * negative), rel=1e-4)
    boxes, logits = torch.autograd.grad(loss, predictions[1::-1], allow_unused=True)
    assert boxes is None  # the IoU is a target
    assert (logits[1, 0, :3, 1] < 0).all()


def test_a_score_whose_box_is_exact_learns_as_with_labels():
    predictions, targets = one_image()
    predictions = predictions._replace(boxes=targets.boxes.expand(2, 1, 4, 4))
    assignment = background(predictions)
    assignment[:, 0, 0] = 0
    exact = criterion(class_target="iou")(predictions, targets, assignment)
    labels = criterion()(predictions, targets, assignment)
    torch.testing.assert_close(exact["loss_ce"], labels["loss_ce"])


def test_l1_compares_corners_or_centers_and_sizes_in_loss_and_cost():
    """The box is 5 of 20 pixels off: both corners, but one center and no size."""
    predictions, targets = one_image()
    assignment = background(predictions)
    assignment[..., 0] = 0
    weights = TermWeights(0.0, 5.0, 0.0)
    for centers, distance in ((False, 0.5), (True, 0.25)):
        loss = criterion(l1_of_centers=centers)(predictions, targets, assignment)["loss_bbox"]
        assert loss.item() == pytest.approx(5 * distance)
        settings = CostSettings(weights, l1_of_centers=centers)
        cost, _ = pairwise_costs(predictions, targets, settings)
        assert cost.flatten().tolist() == pytest.approx(8 * [5 * distance])


@pytest.mark.parametrize("normalizer", ["gt", "positives"])
def test_losses_of_several_sets_of_a_stage_are_summed(normalizer):
    predictions, targets = one_image(sets=3)
    predictions = predictions._replace(stage=torch.tensor([0, 1, 1]))
    assignment = background(predictions)
    assignment[..., 0] = 0
    losses = criterion(normalizer=normalizer)(predictions, targets, assignment)
    for name in ("loss_ce", "loss_bbox", "loss_giou"):
        assert losses[name].item() == pytest.approx(2 * losses[f"{name}_0"].item())


@pytest.mark.parametrize("outputs", [3, 4])
def test_images_without_objects_have_a_class_loss_and_connected_zero_box_losses(outputs):
    predictions, targets = one_image(0, outputs=outputs)
    losses = criterion(focal=outputs == 3)(predictions, targets, background(predictions))
    assert losses["loss_ce"] > 0
    assert losses["loss_bbox"].item() == losses["loss_giou"].item() == 0
    sum(losses.values()).backward()
    assert predictions.boxes.grad.abs().sum() == 0
    assert torch.isfinite(predictions.logits.grad).all()


def test_background_boxes_that_are_not_finite_affect_neither_losses_nor_gradients():
    predictions, targets = one_image()
    with torch.no_grad():
        predictions.boxes[:, :, 3] = math.nan
    assignment = background(predictions)
    assignment[:, 0, 0] = 0
    losses = criterion()(predictions, targets, assignment)
    sum(losses.values()).backward()
    assert all(torch.isfinite(v) for v in losses.values())
    assert torch.isfinite(predictions.boxes.grad).all()


def test_softmax_loss_is_the_weighted_mean_cross_entropy():
    predictions, targets = one_image(outputs=4)
    with torch.no_grad():
        predictions.logits.copy_(torch.randn_like(predictions.logits))
    assignment = background(predictions)
    assignment[:, 0, 1] = 0
    softmax = criterion(focal=False, no_object_weight=0.1)
    assert list(softmax.state_dict()) == ["empty_weight"]
    assert list(criterion().state_dict()) == []
    losses = softmax(predictions, targets, assignment)
    log_p = predictions.logits[1, 0].detach().log_softmax(-1)
    numerator = -log_p[1, 1] - 0.1 * (log_p[0, 3] + log_p[2, 3] + log_p[3, 3])
    assert losses["loss_ce"].item() == pytest.approx(2 * numerator.item() / 1.3, rel=1e-5)


def test_background_without_weight_has_no_loss():
    predictions, targets = one_image(count=0, outputs=4)
    losses = criterion(focal=False, no_object_weight=0.0)(
        predictions, targets, background(predictions)
    )
    assert losses["loss_ce"].item() == 0


def test_losses_are_divided_by_the_number_of_ground_truths_at_least_one():
    losses = []
    for count in (0, 1, 4):
        predictions, targets = one_image(count)
        losses.append(criterion()(predictions, targets, background(predictions))["loss_ce"].item())
    assert losses == pytest.approx([losses[0], losses[0], losses[0] / 4])


def test_normalizer_positives_divides_every_set_by_its_positives_at_least_one():
    predictions, targets = one_image(2, sets=3)
    assignment = background(predictions)
    assignment[0, 0, :3], assignment[1, 0, 0] = 1, 0  # three positives, one, none
    by_positives, by_objects = (
        criterion(num_stages=3, normalizer=n)(predictions, targets, assignment)
        for n in ("positives", "gt")
    )
    for name in ("loss_ce", "loss_bbox", "loss_giou"):
        for suffix, positives in (("_0", 3), ("_1", 1), ("", 1)):
            expected = by_objects[name + suffix] * 2 / positives
            torch.testing.assert_close(by_positives[name + suffix], expected)
