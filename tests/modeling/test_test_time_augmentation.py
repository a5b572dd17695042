import pytest
import torch
from conftest import batch, tiny_cfg
from detectron2.modeling import build_model

from dsrcnn.errors import ConfigError
from dsrcnn.modeling.tta import TestTimeAugmentation, vote_boxes

PLAIN = ["TEST.AUG.MIN_SIZES", (64,), "TEST.AUG.SCALE_FILTER", False, "TEST.AUG.FLIP", False]


def detect(model, inputs):
    with torch.no_grad():
        return model(inputs)[0]["instances"]


def test_a_box_without_neighbours_is_kept():
    boxes, scores = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]]), torch.tensor([0.3, 0.9])
    merged, found = vote_boxes(boxes, scores)
    assert merged.tolist() == [[20, 20, 30, 30], [0, 0, 10, 10]]
    assert found.tolist() == pytest.approx([0.9, 0.3])


def test_neighbours_become_their_weighted_mean_and_stay_with_a_lowered_score():
    # IoU of the two is 8 / 10: mean x2 = (0.6 * 10 + 0.4 * 8) / 1, member 0.4 * (1 - 0.8)
    boxes, scores = torch.tensor([[0.0, 0, 10, 1], [0, 0, 8, 1]]), torch.tensor([0.6, 0.4])
    merged, found = vote_boxes(boxes, scores)
    assert merged[0].tolist() == pytest.approx([0, 0, 9.2, 1])
    assert merged[1].tolist() == [0, 0, 8, 1]
    assert found.tolist() == pytest.approx([0.6, 0.08])


def test_members_with_a_small_score_disappear():
    boxes, scores = torch.tensor([[0.0, 0, 10, 1], [0, 0, 9, 1]]), torch.tensor([0.6, 0.4])
    assert len(vote_boxes(boxes, scores)[0]) == 1  # 0.4 * 0.1 is below 0.05


def test_no_boxes_and_empty_boxes_are_merged_too():
    assert len(vote_boxes(torch.zeros(0, 4), torch.zeros(0))[0]) == 0
    assert len(vote_boxes(torch.zeros(2, 4), torch.tensor([0.5, 0.4]))[0]) == 2


@pytest.mark.parametrize("voting", [True, False])
def test_one_plain_view_of_distinct_boxes_is_plain_inference(voting, monkeypatch):
    cfg = tiny_cfg(*PLAIN, "TEST.AUG.CVPODS_TTA", voting, "MODEL.ROI_HEADS.NMS_THRESH_TEST", 1.0)
    model, inputs = build_model(cfg).eval(), batch([(64, 96)], [0])
    if voting:  # a threshold no pair of boxes reaches
        module = "dsrcnn.modeling.test_time_augmentation"
        plain = lambda b, s: vote_boxes(b, s, iou=1.1)  # noqa: E731
        monkeypatch.setattr(f"{module}.vote_boxes", plain)
    expected, found = detect(model, inputs), detect(TestTimeAugmentation(cfg, model), inputs)
    torch.testing.assert_close(found.scores, expected.scores)
    torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor)
    assert torch.equal(found.pred_classes, expected.pred_classes)


def test_views_come_in_all_sizes_plain_and_flipped_and_boxes_return_to_the_original():
    class Centre(torch.nn.Module):
        """Finds one box, a fixed part of whatever image it sees; notes the views."""

        def __init__(self, real):
            super().__init__()
            self.real, self.seen = real, []

        def forward(self, inputs):
            height, width = inputs[0]["image"].shape[1:]
            self.seen.append((height, width))
            output = self.real(inputs)
            found = output[0]["instances"][:1]
            part = torch.tensor([[0.25, 0.25, 0.5, 0.75]])
            found.pred_boxes.tensor = part * torch.tensor([width, height, width, height])
            found.pred_classes[:] = 0
            return [{"instances": found}]

    cfg = tiny_cfg("TEST.AUG.MIN_SIZES", (64, 128), "TEST.AUG.SCALE_FILTER", False)
    model = Centre(build_model(cfg).eval())
    inputs = batch([(64, 96)], [0])
    inputs[0] |= {"height": 640, "width": 960}
    found = detect(TestTimeAugmentation(cfg, model), inputs)
    assert model.seen == [(64, 96), (64, 96), (128, 192), (128, 192)]
    boxes = found.pred_boxes.tensor
    plain, flipped = torch.tensor([240.0, 160, 480, 480]), torch.tensor([480.0, 160, 720, 480])
    for box in boxes:
        assert torch.allclose(box, plain, atol=1) or torch.allclose(box, flipped, atol=1)
    assert len(boxes) >= 2


def test_boxes_that_do_not_suit_their_size_are_left_out():
    ranges = [[0, 1], [0, 10000]]  # none of the small view
    cfg = tiny_cfg("TEST.AUG.MIN_SIZES", (64, 128), "TEST.AUG.FLIP", False)
    cfg.TEST.AUG.SCALE_RANGES = ranges
    model, inputs = build_model(cfg).eval(), batch([(64, 96)], [0])
    both = detect(TestTimeAugmentation(cfg, model), inputs)
    cfg = tiny_cfg(*PLAIN)
    cfg.TEST.AUG.MIN_SIZES = (128,)
    large = detect(TestTimeAugmentation(cfg, model), inputs)
    torch.testing.assert_close(both.scores, large.scores)


def test_a_range_is_needed_for_every_size():
    cfg = tiny_cfg("TEST.AUG.MIN_SIZES", (64,))
    with pytest.raises(ConfigError, match="SCALE_RANGES has 13 entries"):
        TestTimeAugmentation(cfg, torch.nn.Identity())
