import numpy as np
import pytest
import torch
from conftest import batch, tiny_cfg
from detectron2.modeling import DatasetMapperTTA, build_model
from detectron2.structures import Boxes, Instances

from dsrcnn.errors import ConfigError
from dsrcnn.modeling.tta import TestTimeAugmentation, Views, vote_boxes

PLAIN = ["TEST.AUG.MIN_SIZES", (64,), "TEST.AUG.SCALE_FILTER", False, "TEST.AUG.FLIP", False]


def detect(model, inputs):
    with torch.no_grad():
        return model(inputs)[0]["instances"]


A = [0.0, 0, 10, 1]


@pytest.mark.parametrize(("boxes", "scores", "merged", "merged_scores"), [
    ([A, [20, 20, 30, 30]], [0.3, 0.9], [[20, 20, 30, 30], A], [0.9, 0.3]),
    # IoU 8 / 10: mean x2 = (0.6 * 10 + 0.4 * 8) / 1; the score of the second is 0.4 * (1 - 0.8).
    ([A, [0.0, 0, 8, 1]], [0.6, 0.4], [[0, 0, 9.2, 1], [0, 0, 8, 1]], [0.6, 0.08]),
    ([A, [0.0, 0, 9, 1]], [0.6, 0.4], [[0, 0, 9.6, 1]], [0.6]),  # 0.4 * 0.1 is below 0.05
    ([], [], [], []), ([[0.0] * 4] * 2, [0.5, 0.4], [[0.0] * 4] * 2, [0.5, 0.4]),
])  # fmt: skip
def test_overlapping_boxes_are_averaged_and_kept_while_their_lowered_scores_are_high_enough(
    boxes, scores, merged, merged_scores
):
    results = vote_boxes(torch.tensor(boxes).view(-1, 4), torch.tensor(scores))
    torch.testing.assert_close(results[0], torch.tensor(merged).float().view(-1, 4))
    torch.testing.assert_close(results[1], torch.tensor(merged_scores))


@pytest.mark.parametrize("voting", [True, False])
def test_one_plain_view_equals_plain_inference(voting, monkeypatch):
    cfg = tiny_cfg(*PLAIN, "TEST.AUG.CVPODS_TTA", voting, "MODEL.ROI_HEADS.NMS_THRESH_TEST", 1.0)
    model, inputs = build_model(cfg).eval(), batch([(64, 96)], [0])
    if voting:  # by an IoU that no pair of boxes reaches
        no_voting = lambda b, s: vote_boxes(b, s, iou=1.1)  # noqa: E731
        monkeypatch.setattr("dsrcnn.modeling.tta.vote_boxes", no_voting)
    expected, merged = detect(model, inputs), detect(TestTimeAugmentation(cfg, model), inputs)
    torch.testing.assert_close(merged.scores, expected.scores)
    torch.testing.assert_close(merged.pred_boxes.tensor, expected.pred_boxes.tensor)
    assert torch.equal(merged.pred_classes, expected.pred_classes)


def test_boxes_of_all_sizes_and_flips_return_to_the_original_image():
    views = []

    def detector(inputs):
        """Detect a fixed part of any image."""
        height, width = inputs[0]["image"].shape[1:]
        views.append((height, width))
        instances = Instances((height, width))
        part = torch.tensor([[0.25, 0.25, 0.5, 0.75]])
        instances.pred_boxes = Boxes(part * torch.tensor([width, height, width, height]))
        instances.scores, instances.pred_classes = torch.tensor([0.9]), torch.tensor([0])
        return [{"instances": instances}]

    cfg = tiny_cfg("TEST.AUG.MIN_SIZES", (64, 128), "TEST.AUG.SCALE_FILTER", False)
    inputs = batch([(64, 96)], [0])
    inputs[0] |= {"height": 640, "width": 960}
    boxes = detect(TestTimeAugmentation(cfg, detector), inputs).pred_boxes.tensor
    assert views == [(64, 96), (64, 96), (128, 192), (128, 192)]
    plain, flipped = torch.tensor([240.0, 160, 480, 480]), torch.tensor([480.0, 160, 720, 480])
    for box in boxes:
        assert torch.allclose(box, plain, atol=1) or torch.allclose(box, flipped, atol=1)
    assert len(boxes) >= 2


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("original", [(64, 96), (640, 960)])
def test_views_are_those_of_detectron2(flip, original):
    cfg = tiny_cfg("TEST.AUG.MIN_SIZES", (48, 64, 100), "TEST.AUG.FLIP", flip)
    (record,) = batch([(64, 96)], [0])
    record |= {"image": record["image"].byte(), "height": original[0], "width": original[1]}
    expected = DatasetMapperTTA(cfg)(record)
    views = Views(cfg.TEST.AUG.MIN_SIZES, cfg.TEST.AUG.MAX_SIZE, flip)(record)
    assert len(views) == len(expected) == 3 * (1 + flip)
    boxes = np.array([[1.0, 2, 30, 40]])
    for view, other in zip(views, expected, strict=True):
        assert torch.equal(view["image"], other["image"])
        inverse = [x["transforms"].inverse().apply_box(boxes) for x in (view, other)]
        np.testing.assert_allclose(*inverse)


@pytest.mark.parametrize("shape", [(2000, 4), (4, 2000)])
def test_narrow_images_keep_a_pixel(shape):
    cfg = tiny_cfg("TEST.AUG.MIN_SIZES", (64,), "TEST.AUG.SCALE_FILTER", False)
    cfg.TEST.AUG.MAX_SIZE = 128
    model = TestTimeAugmentation(cfg, build_model(cfg).eval())
    image = torch.zeros((3, *shape), dtype=torch.uint8)
    boxes = detect(model, [{"image": image, "height": shape[0], "width": shape[1]}]).pred_boxes
    assert (boxes.tensor[:, 2] <= shape[1]).all()


def test_boxes_that_do_not_fit_the_scale_are_dropped():
    cfg = tiny_cfg("TEST.AUG.MIN_SIZES", (64, 128), "TEST.AUG.FLIP", False)
    cfg.TEST.AUG.SCALE_RANGES = [[0, 1], [0, 10000]]  # none of the small view
    model, inputs = build_model(cfg).eval(), batch([(64, 96)], [0])
    both = detect(TestTimeAugmentation(cfg, model), inputs)
    cfg = tiny_cfg(*PLAIN, "TEST.AUG.MIN_SIZES", (128,))
    large = detect(TestTimeAugmentation(cfg, model), inputs)
    torch.testing.assert_close(both.scores, large.scores)


def test_every_size_needs_a_range():
    cfg = tiny_cfg("TEST.AUG.MIN_SIZES", (64,))
    with pytest.raises(ConfigError, match="SCALE_RANGES has 13 entries"):
        TestTimeAugmentation(cfg, torch.nn.Identity())
