import pytest
import torch
from conftest import batch, tiny_cfg
from detectron2.modeling import build_model
from torchvision.ops import batched_nms

from dsrcnn.modeling.postprocessing import select_detections, suppress_duplicates


def detections(images=3, count=40, classes=5, seed=0):
    """Random detections with many overlaps, sorted by score."""
    g = torch.Generator().manual_seed(seed)
    scores = torch.rand(images, count, generator=g).sort(dim=1, descending=True).values
    corner = torch.rand(images, count, 2, generator=g) * 30
    extent = 30 + torch.rand(images, count, 2, generator=g) * 20
    labels = torch.randint(0, classes, (images, count), generator=g)
    return scores, labels, torch.cat([corner, corner + extent], dim=-1)


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.7, 1.0])
def test_suppressing_all_images_at_once_equals_one_by_one(threshold):
    scores, classes, boxes = detections()
    kept = suppress_duplicates(scores, classes, boxes, threshold=threshold)
    for image in range(3):
        alone = batched_nms(boxes[image], scores[image], classes[image], threshold)
        assert torch.equal(kept[image].nonzero().flatten(), alone.sort().values)


def test_boxes_of_other_classes_are_no_duplicates():
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 10, 9], [50, 0, 60, 10]]])
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.6]])
    kept = suppress_duplicates(scores, torch.tensor([[0, 1, 0, 0]]), boxes, threshold=0.7)
    assert kept.tolist() == [[True, True, False, True]]


def test_across_classes_the_best_box_stays():
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 10]], [[0, 0, 10, 10], [0, 0, 10, 10]]])
    scores, classes = torch.tensor([[0.9, 0.8]] * 2), torch.tensor([[0, 1]] * 2)
    kept = suppress_duplicates(scores, classes, boxes, threshold=0.7, class_wise=False)
    assert kept.tolist() == [[True, False]] * 2


def test_selection_with_suppression_can_be_traced_and_exported():
    class Select(torch.nn.Module):
        def forward(self, logits, boxes):
            return select_detections(logits, boxes, limit=10, focal=True, nms_threshold=0.5)

    g = torch.Generator().manual_seed(0)
    scenes = [(torch.randn(2, 12, 3, generator=g), detections(2, 12, seed=s)[2]) for s in (0, 1)]
    traced = torch.jit.trace(Select(), scenes[0])
    exported = torch.export.export(Select(), scenes[0]).module()
    for inputs in scenes:
        expected = Select()(*inputs)
        assert not expected.kept.all()
        for found in (traced(*inputs), exported(*inputs)):
            assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


def test_a_diverged_box_does_not_blur_the_others():
    scores, classes, boxes = detections(count=20)
    expected = suppress_duplicates(scores, classes, boxes, threshold=0.7)
    boxes[0, 3], boxes[1, 5] = float("nan"), 1e30
    found = suppress_duplicates(scores, classes, boxes, threshold=0.7)
    assert torch.equal(found[2], expected[2])
    assert found[0].sum() >= expected[0].sum() - 1


def test_the_limit_counts_what_suppression_leaves():
    # Two duplicates in front: with a limit of 2 the second object is still reported.
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 9.9], [50, 0, 60, 10], [80, 0, 90, 10]]])
    logits = torch.tensor([[[4.0], [3], [2], [1]]])
    found = select_detections(logits, boxes, limit=2, focal=True, nms_threshold=0.7)
    assert found.kept.tolist() == [[True, False, True, False]]
    plain = select_detections(logits, boxes, limit=2, focal=True)
    assert plain.kept.tolist() == [[True, True]]
    everything = select_detections(logits, boxes, limit=-1, focal=True, nms_threshold=0.7)
    assert everything.kept.tolist() == [[True, False, True, True]]


def test_overlaps_are_those_inside_the_image():
    # Outside of it the boxes differ, inside they are one: IoU 0.5, or 1 after clipping.
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 20, 10]]])
    logits, sizes = torch.tensor([[[4.0], [3]]]), torch.tensor([[10.0, 10, 10, 10]])
    for given, expected in ((None, [True, True]), (sizes, [True, False])):
        found = select_detections(
            logits, boxes, limit=9, focal=True, nms_threshold=0.7, sizes=given
        )
        assert found.kept[0].tolist() == expected
        assert torch.equal(found.boxes, boxes)


@pytest.mark.parametrize(
    ("opts", "expected"),
    [
        ([], None),
        (["DLA.ENABLED", True], 0.7),
        (["DLA.ENABLED", True, "DLA.MATCHER", "SimOTAMatcher"], 0.7),
        (["DLA.ENABLED", True, "DLA.MATCHER", "HungarianMatcher"], None),
        (["DLA.ENABLED", True, "NMS.ENABLED", False], None),
        (["NMS.ENABLED", True, "NMS.THRESHOLD", 0.5], 0.5),
    ],
)
def test_suppression_is_on_where_the_assignment_is_one_to_many_or_where_asked_for(opts, expected):
    keys = [f"MODEL.SparseRCNN.{x}" if i % 2 == 0 else x for i, x in enumerate(opts)]
    assert build_model(tiny_cfg(*keys)).nms_threshold == expected


def test_a_model_with_suppression_never_detects_more_and_no_two_of_a_class_overlap():
    cfg = tiny_cfg("MODEL.SparseRCNN.NUM_PROPOSALS", 60)
    model, inputs = build_model(cfg).eval(), batch([(96, 128), (64, 96)], [2, 1])
    with torch.no_grad():
        plain = [x["instances"] for x in model(inputs)]
        model.nms_threshold = 0.5
        found = [x["instances"] for x in model(inputs)]
    for before, after in zip(plain, found, strict=True):
        assert 0 < len(after) < len(before)
        again = batched_nms(after.pred_boxes.tensor, after.scores, after.pred_classes, 0.51)
        assert len(again) == len(after)
