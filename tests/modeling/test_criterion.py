import math

import pytest
import torch

from dsrcnn.modeling.losses import SetCriterion
from dsrcnn.structures import Predictions, Targets, TermWeights

PRIOR_LOGIT = -4.59511985013459


def criterion(**kwargs):
    defaults = {"num_classes": 3, "num_stages": 2, "weights": TermWeights(2.0, 5.0, 2.0)}
    return SetCriterion(**{**defaults, **kwargs})


def one_image(objects=1, *, sets=2, proposals=4, classes=3, outputs=None):
    """Predictions at the prior and `objects` ground truths of class 1 in a 20 x 10 image."""
    logits = torch.full((sets, 1, proposals, outputs or classes), PRIOR_LOGIT)
    boxes = torch.tensor([0.0, 0, 10, 10]).expand(sets, 1, proposals, 4).clone()
    predictions = Predictions(logits.requires_grad_(), boxes.requires_grad_(), torch.arange(sets))
    targets = Targets(
        torch.tensor([5.0, 0, 15, 10]).expand(1, objects, 4),
        torch.ones(1, objects, dtype=torch.int64),
        torch.ones(1, objects, dtype=torch.bool),
        torch.tensor([[20.0, 10, 20, 10]]),
    )
    return predictions, targets


def background(predictions):
    return torch.full(predictions.boxes.shape[:3], -1)


def test_classification_at_the_prior_has_the_known_value():
    predictions, targets = one_image(0, sets=1, proposals=300, classes=80)
    losses = criterion(num_classes=80, num_stages=1)(predictions, targets, background(predictions))
    assert losses["loss_ce"].item() == pytest.approx(2 * 300 * 80 * 7.537752e-7, rel=1e-4)


def test_box_losses_have_the_values_worked_out_by_hand():
    predictions, targets = one_image()
    assignment = background(predictions)
    assignment[:, 0, 2] = 0
    losses = criterion()(predictions, targets, assignment)
    # x1 and x2 are 5 of 20 pixels off; IoU = GIoU = 1/3
    assert losses["loss_bbox"].item() == pytest.approx(5 * 0.5)
    assert losses["loss_giou"].item() == pytest.approx(2 * 2 / 3)
    p = 0.01
    positive = 0.25 * (1 - p) ** 2 * -math.log(p)
    negative = 0.75 * p**2 * -math.log(1 - p)
    assert losses["loss_ce"].item() == pytest.approx(2 * (positive + 11 * negative), rel=1e-4)


def test_several_proposals_may_learn_one_object():
    predictions, targets = one_image()
    assignment = background(predictions)
    assignment[:, 0, :3] = 0
    losses = criterion()(predictions, targets, assignment)
    assert losses["loss_bbox"].item() == pytest.approx(3 * 5 * 0.5)


def test_every_stage_has_its_losses_and_the_last_has_no_suffix():
    predictions, targets = one_image(sets=6)
    names = criterion(num_stages=6)(predictions, targets, background(predictions))
    assert len(names) == 18
    assert {n for n in names if n.startswith("loss_ce")} == {
        "loss_ce", "loss_ce_0", "loss_ce_1", "loss_ce_2", "loss_ce_3", "loss_ce_4",
    }  # fmt: skip


def test_without_deep_supervision_only_the_last_stage_has_losses():
    predictions, targets = one_image(sets=1)
    predictions = predictions._replace(stage=torch.tensor([5]))
    losses = criterion(num_stages=6, deep_supervision=False)(
        predictions, targets, background(predictions)
    )
    assert set(losses) == {"loss_ce", "loss_bbox", "loss_giou"}
    assert losses["loss_ce"] > 0


def test_several_sets_of_one_stage_are_summed():
    predictions, targets = one_image(sets=3)
    predictions = predictions._replace(stage=torch.tensor([0, 1, 1]))
    losses = criterion()(predictions, targets, background(predictions))
    assert losses["loss_ce"].item() == pytest.approx(2 * losses["loss_ce_0"].item())


@pytest.mark.parametrize("outputs", [3, 4])
def test_images_without_objects_have_a_class_loss_and_connected_zero_box_losses(outputs):
    predictions, targets = one_image(0, outputs=outputs)
    losses = criterion(focal=outputs == 3)(predictions, targets, background(predictions))
    assert losses["loss_ce"] > 0
    assert losses["loss_bbox"].item() == losses["loss_giou"].item() == 0
    sum(losses.values()).backward()
    assert predictions.boxes.grad.abs().sum() == 0
    assert torch.isfinite(predictions.logits.grad).all()


def test_background_boxes_that_are_not_finite_do_no_harm():
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
    losses = criterion(focal=False, no_object_weight=0.1)(predictions, targets, assignment)
    log_p = predictions.logits[1, 0].detach().log_softmax(-1)
    numerator = -log_p[1, 1] - 0.1 * (log_p[0, 3] + log_p[2, 3] + log_p[3, 3])
    assert losses["loss_ce"].item() == pytest.approx(2 * numerator.item() / 1.3, rel=1e-5)


def test_class_weights_are_in_the_state_dict_only_with_softmax():
    assert list(criterion().state_dict()) == []
    assert list(criterion(focal=False).state_dict()) == ["empty_weight"]


def test_the_normalizer_is_the_number_of_ground_truths():
    losses = []
    for objects in (1, 4):
        predictions, targets = one_image(objects)
        losses.append(criterion()(predictions, targets, background(predictions))["loss_ce"].item())
    assert losses[0] == pytest.approx(4 * losses[1])


def test_positives_normalise_each_set_by_its_own_count():
    predictions, targets = one_image(2, sets=2)
    assignment = background(predictions)
    assignment[0, 0, :3], assignment[1, 0, 0] = 1, 0  # three positives, then one
    by_positives = criterion(normalizer="positives")(predictions, targets, assignment)
    by_objects = criterion()(predictions, targets, assignment)
    for name in ("loss_ce", "loss_bbox", "loss_giou"):
        torch.testing.assert_close(by_positives[f"{name}_0"] * 3, by_objects[f"{name}_0"] * 2)
        torch.testing.assert_close(by_positives[name] * 1, by_objects[name] * 2)


def test_both_normalisers_agree_for_one_proposal_per_object():
    predictions, targets = one_image(2)
    assignment = background(predictions)
    assignment[:, 0, 1], assignment[:, 0, 3] = 0, 1
    found = criterion(normalizer="positives")(predictions, targets, assignment)
    assert found == criterion()(predictions, targets, assignment)


def test_a_set_without_positives_is_divided_by_one():
    predictions, targets = one_image(2)
    found = criterion(normalizer="positives")(predictions, targets, background(predictions))
    expected = criterion()(predictions, targets, background(predictions))
    torch.testing.assert_close(found["loss_ce"], expected["loss_ce"] * 2)
