"""From predictions to detections: selection, NMS, limits, and the original image."""

from dataclasses import replace

import pytest
import torch
from conftest import batch, tiny_cfg
from detectors import DLA, SIZES, enable, model_of, options
from torchvision import ops

from dsrcnn.modeling.postprocessing import (
    DetectionSettings,
    batched_nms,
    dense_nms,
    nms_without_wait,
    select_detections,
)


def overlapping(images=3, count=40, classes=5, seed=0):
    """Random scores, sorted, classes, and boxes with many overlaps."""
    g = torch.Generator().manual_seed(seed)
    scores = torch.rand(images, count, generator=g).sort(dim=1, descending=True).values
    corner = torch.rand(images, count, 2, generator=g) * 30
    extent = 30 + torch.rand(images, count, 2, generator=g) * 20
    labels = torch.randint(0, classes, (images, count), generator=g)
    return scores, labels, torch.cat([corner, corner + extent], dim=-1)


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.7, 1.0])
def test_nms_of_all_images_at_once_agrees_with_one_by_one(threshold):
    scores, classes, boxes = overlapping()
    kept = batched_nms(scores, classes, boxes, threshold)
    for image in range(3):
        alone = ops.batched_nms(boxes[image], scores[image], classes[image], threshold)
        assert torch.equal(kept[image].nonzero().flatten(), alone.sort().values)


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("seed", range(5))
def test_dense_nms_keeps_the_same_boxes(threshold, seed):
    scores, classes, boxes = overlapping(count=200, seed=seed)
    boxes[0, 3] = float("nan")
    boxes[1, 7, 2:] = boxes[1, 7, :2]  # without area
    expected = batched_nms(scores, classes, boxes, threshold)
    assert expected.any(dim=1).all()
    assert torch.equal(dense_nms(scores, classes, boxes, threshold), expected)


def chain_of(count):
    """Scores, classes and boxes of which each overlaps the next one alone by more than 0.2."""
    left = torch.arange(float(count)) * 5
    boxes = torch.stack([left, torch.zeros(count), left + 8, torch.ones(count)], dim=-1)
    scores, classes = torch.linspace(1, 0.1, count), torch.zeros(count, dtype=torch.int64)
    return scores.unsqueeze(0), classes.unsqueeze(0), boxes.unsqueeze(0)


def test_dense_nms_settles_long_chains():
    assert dense_nms(*chain_of(16), 0.2).tolist() == [[True, False] * 8]


def test_nms_without_wait_settles_any_chain_on_a_cpu_and_is_matrix_products_in_graphs():
    chain = chain_of(60)
    assert nms_without_wait(*chain, 0.2).tolist() == [[True, False] * 30]
    traced = torch.jit.trace(lambda *x: nms_without_wait(*x, 0.2), chain)
    assert torch.equal(traced(*chain), dense_nms(*chain, 0.2))
    assert "torchvision" not in str(traced.graph)


def test_nms_of_other_images_is_exact_beside_boxes_that_diverged():
    scores, classes, boxes = overlapping(count=20)
    expected = batched_nms(scores, classes, boxes, 0.7)
    boxes[0, 3], boxes[1, 5] = float("nan"), 1e30
    kept = batched_nms(scores, classes, boxes, 0.7)
    assert torch.equal(kept[2], expected[2])
    assert kept[0].sum() >= expected[0].sum() - 1


def test_selection_with_nms_can_be_traced_and_exported():
    class Select(torch.nn.Module):
        def forward(self, logits, boxes):
            return select_detections(logits, boxes, DetectionSettings(10, nms_threshold=0.5))

    g = torch.Generator().manual_seed(0)
    scenes = [(torch.randn(2, 12, 3, generator=g), overlapping(2, 12, seed=s)[2]) for s in (0, 1)]
    traced = torch.jit.trace(Select(), scenes[0])
    exported = torch.export.export(Select(), scenes[0]).module()
    for inputs in scenes:
        expected = Select()(*inputs)
        assert not expected.kept.all()
        for detections in (traced(*inputs), exported(*inputs)):
            assert all(torch.equal(a, b) for a, b in zip(detections, expected, strict=True))


def test_limit_counts_detections_that_nms_keeps():
    # Two duplicates in front: with a limit of 2 the second object is still reported.
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 9.9], [50, 0, 60, 10], [80, 0, 90, 10]]])
    logits = torch.tensor([[[4.0], [3], [2], [1]]])
    table = (2, 0.7, [1, 0, 1, 0]), (2, None, [1, 1]), (-1, 0.7, [1, 0, 1, 1])
    for limit, threshold, expected in table:
        settings = DetectionSettings(limit, nms_threshold=threshold)
        assert select_detections(logits, boxes, settings).kept.tolist() == [expected]


def test_nms_compares_boxes_clipped_to_the_image():
    # Outside of it the boxes differ, inside they are one: IoU 0.5, or 1 after clipping.
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 20, 10]]])
    logits, settings = torch.tensor([[[4.0], [3]]]), DetectionSettings(9, nms_threshold=0.7)
    for sizes, expected in ((None, [True, True]), (torch.full((1, 4), 10.0), [True, False])):
        detections = select_detections(logits, boxes, settings, sizes=sizes)
        assert detections.kept[0].tolist() == expected
        assert torch.equal(detections.boxes, boxes)


def test_padded_proposals_are_not_detected():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    logits, boxes = torch.randn(2, 3, 1), torch.rand(2, 3, 4)
    detections = select_detections(logits, boxes, DetectionSettings(), mask=mask)
    assert detections.kept.tolist() == mask.tolist()
    assert torch.equal(detections.scores[0, :2], logits[0, :2, 0].sigmoid().sort().values.flip(0))


@pytest.mark.parametrize(("limit", "expected"), [(3, 3), (8, 8), (100, 8)])
@pytest.mark.parametrize("focal", [True, False])
def test_detections_are_sorted_and_limited_by_settings_and_proposals(limit, expected, focal):
    settings = DetectionSettings(limit, focal=focal)
    detections = select_detections(torch.randn(2, 8, 5), torch.rand(2, 8, 4), settings)
    scores = detections.scores
    assert scores.shape == detections.classes.shape == detections.kept.shape == (2, expected)
    assert torch.equal(scores, scores.sort(dim=1, descending=True).values)


def test_a_proposal_may_be_detected_with_two_classes():
    # p = 0.9 and 0.8 on the first proposal, 0.7 on the second
    odds = torch.tensor([[[9.0, 4.0], [7 / 3, 0.1]]])
    boxes = torch.tensor([[[0.0, 0, 1, 1], [0, 0, 2, 2]]])
    detections = select_detections(odds.log(), boxes, DetectionSettings())
    assert detections.scores[0].tolist() == pytest.approx([0.9, 0.8])
    assert detections.classes[0].tolist() == [0, 1]
    assert detections.boxes[0, :, 2].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(("opts", "expected"), [
    ([], None), (DLA, 0.7), (enable("DLA", "MATCHER", "SimOTAMatcher"), 0.7),
    (enable("DLA", "MATCHER", "HungarianMatcher"), None),
    ([*enable("SQR"), *options("NUM_HEADS", 3)], 0.7), (enable("SQR", "START", 2), None),
    (enable("SQR", "MODE", "dense"), 0.7), (enable("SQR", "START", 1, "ENABLED", False), None),
    ([*DLA, *options("NMS.ENABLED", False)], None), (enable("NMS", "THRESHOLD", 0.5), 0.5),
])  # fmt: skip
def test_nms_is_on_where_training_makes_duplicates_unless_configured(opts, expected):
    settings = DetectionSettings.from_config(tiny_cfg(*opts, "TEST.DETECTIONS_PER_IMAGE", 3))
    assert settings == DetectionSettings(limit=3, nms_threshold=expected)


def test_a_model_with_nms_detects_fewer_objects_and_no_two_of_a_class_overlap():
    model, inputs = model_of(*options("NUM_PROPOSALS", 60)).eval(), batch(SIZES, [2, 1])
    with torch.no_grad():
        plain = [x["instances"] for x in model(inputs)]
        model.detection = replace(model.detection, nms_threshold=0.5)
        detections = [x["instances"] for x in model(inputs)]
    for before, after in zip(plain, detections, strict=True):
        assert 0 < len(after) < len(before)
        again = ops.batched_nms(after.pred_boxes.tensor, after.scores, after.pred_classes, 0.51)
        assert len(again) == len(after)


def test_detections_are_scaled_to_the_original_image_and_clipped():
    inputs = batch([(64, 96)], [0])
    model = model_of("TEST.DETECTIONS_PER_IMAGE", 3).eval()
    with torch.no_grad():
        small = model(inputs)[0]["instances"]
        large = model([{**inputs[0], "height": 128, "width": 192}])[0]["instances"]
    assert 0 < len(large) <= 3
    assert large.image_size == (128, 192)
    boxes = large.pred_boxes.tensor
    torch.testing.assert_close(boxes, small.pred_boxes.tensor * 2)
    assert (boxes >= 0).all()
    assert (boxes <= torch.tensor([192, 128, 192, 128])).all()
