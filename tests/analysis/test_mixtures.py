"""The permutation test of DPG's mixtures."""

from statistics import mean

import cv2
import pytest
import torch
from conftest import tiny_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from dsrcnn.analysis.mixtures import PermutationTest, draw_permutation_test, permutation_test
from dsrcnn.errors import DataError


def images_of_two_kinds(count, seed):
    """A bright square of class 0 on the left, or of class 1 on the right."""
    generator = torch.Generator().manual_seed(seed)
    inputs = []
    for is_right in (torch.rand(count, generator=generator) > 0.5).tolist():
        image = torch.randint(0, 60, (3, 64, 96), generator=generator, dtype=torch.uint8)
        x = 60 if is_right else 4
        image[:, 16:48, x : x + 32] += 150
        instances = Instances((64, 96))
        instances.gt_boxes = Boxes(torch.tensor([[x, 16.0, x + 32, 48.0]]))
        instances.gt_classes = torch.tensor([int(is_right)])
        inputs.append({"image": image, "instances": instances, "height": 64, "width": 96})
    return inputs


@pytest.fixture(scope="module")
def trained():
    """A model whose proposals alone were trained, so that only mixtures tell images apart."""
    torch.manual_seed(1)
    node = "MODEL.SparseRCNN"
    opts = [f"{node}.DPG.ENABLED", True, f"{node}.DPG.HIDDEN", 64, f"{node}.NUM_HEADS", 1]
    model = build_model(tiny_cfg(*opts))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("proposals"))
    optimizer = torch.optim.AdamW(model.proposals.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)
    for step in range(60):
        loss = sum(model(images_of_two_kinds(4, step)).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def test_mixtures_of_a_trained_model_fit_their_images_better_than_those_of_others(trained):
    result = permutation_test(trained, images_of_two_kinds(20, -1), permutations=10)
    assert len(result.others) == 10
    assert result.own < min(result.average, *result.others)
    assert result.deviations > 2


@torch.no_grad()
def test_mixtures_that_are_the_same_for_all_images_make_no_difference(trained):
    inputs = images_of_two_kinds(6, -1)
    weight = trained.proposals.fc2.weight
    before = weight.clone()
    weight.zero_()
    result = permutation_test(trained, inputs, permutations=4)
    weight.copy_(before)
    assert [*result.others, result.average] == pytest.approx([result.own] * 5, rel=1e-4)


@torch.no_grad()
def test_the_loss_with_own_mixtures_is_that_of_the_images_one_by_one(trained):
    inputs = images_of_two_kinds(5, -1)
    result = permutation_test(trained, inputs, permutations=9)
    assert len(result.others) == 4  # as many as there are other images
    norms = trained.proposals
    before = {k: v.clone() for k, v in norms.state_dict().items()}
    alone = [sum(losses_in_evaluation(trained, x).values()).item() for x in inputs]
    assert result.own == pytest.approx(mean(alone), rel=1e-4)
    assert all(torch.equal(v, before[k]) for k, v in norms.state_dict().items())


def losses_in_evaluation(model, record):
    """Losses of an image, with the norms and the temperature of an evaluation."""
    model.training = True
    try:
        return model([record])
    finally:
        model.training = False


def test_deviations_compare_the_own_loss_with_the_spread_of_the_others():
    result = PermutationTest(own=4.0, others=[5.0, 6.0, 7.0], average=5.0)
    assert result.deviations == pytest.approx(2.0)
    assert result.statistics()["own is lower by deviations"] == pytest.approx(2.0)


def test_too_few_images_are_refused(trained):
    with pytest.raises(DataError, match=r"2 annotated test images; give it at least 3"):
        permutation_test(trained, images_of_two_kinds(2, 0))


def test_the_picture_shows_all_three(tmp_path):
    result = PermutationTest(own=4.0, others=[5.0, 6.0, 7.0], average=5.0)
    picture = cv2.imread(str(draw_permutation_test(result, tmp_path / "permutations.png")))
    assert picture.shape[1] > 500
    assert picture.std() > 10
