import pytest
import torch
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes

from dsrcnn.layers.roi_align import FeatureTable, assign_levels, pool_rois

STRIDES = (4, 8, 16, 32)


def pyramid(images=2):
    shapes = [(images, 3, 96 // s, 160 // s) for s in STRIDES]
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def random_boxes(images, count, extent):
    center = torch.rand(images, count, 2) * torch.tensor([160.0, 96.0]) * 1.4 - 20
    size = torch.rand(images, count, 2) * extent
    return torch.cat([center - size / 2, center + size / 2], dim=-1)


def by_detectron2(features, boxes, cells=7, samples=2, kind="ROIAlignV2"):
    pooler = ROIPooler(cells, tuple(1 / s for s in STRIDES), samples, kind)
    return pooler(features, [Boxes(b) for b in boxes]).flatten(2).transpose(1, 2)


@pytest.mark.parametrize("side", [56.0, 111.9, 112.0, 224.0, 447.0, 448.0, 900.0, 0.0, 1.0])
def test_levels_follow_the_size_of_the_box(side):
    expected = {56.0: 2, 111.9: 2, 112.0: 3, 224.0: 4, 447.0: 4, 448.0: 5, 900.0: 5}
    box = torch.tensor([[0.0, 0.0, side, side]])
    areas = FeatureTable.from_levels(pyramid(), STRIDES).levels.areas
    assert assign_levels(box, areas).item() + 2 == expected.get(side, 2)


@pytest.mark.parametrize("extent", [1.0, 30.0, 150.0, 900.0])
@pytest.mark.parametrize(("aligned", "kind"), [(True, "ROIAlignV2"), (False, "ROIAlign")])
def test_values_equal_detectron2s_also_outside_of_the_image(extent, aligned, kind):
    features, boxes = pyramid(), random_boxes(2, 40, extent)
    boxes[:, 0, 2:] = boxes[:, 0, :2]  # an empty one
    pooled = pool_rois(FeatureTable.from_levels(features, STRIDES), boxes, aligned=aligned)
    expected = by_detectron2(features, boxes, kind=kind)
    torch.testing.assert_close(pooled, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("cells", "samples"), [(7, 2), (3, 1), (5, 3)])
def test_gradients_equal_detectron2s(cells, samples):
    features, boxes = pyramid(), random_boxes(2, 30, 300.0)
    weights = torch.randn(60, cells * cells, 3)
    table = FeatureTable.from_levels(features, STRIDES)
    pooled = pool_rois(table, boxes, cells=cells, samples=samples)
    gradients = torch.autograd.grad(pooled, features, weights)
    reference = by_detectron2(features, boxes, cells, samples)
    expected = torch.autograd.grad(reference, features, weights, materialize_grads=True)
    torch.testing.assert_close(gradients, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_huge_boxes_and_boxes_that_are_not_finite_have_finite_features(value):
    boxes = torch.tensor([[[value, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, value], [1.0, 1, 9, 9]]])
    pooled = pool_rois(FeatureTable.from_levels(pyramid(images=1), STRIDES), boxes)
    assert torch.isfinite(pooled).all()


def test_no_gradient_reaches_the_boxes():
    boxes = random_boxes(2, 4, 100.0).requires_grad_()
    pooled = pool_rois(FeatureTable.from_levels(pyramid(), STRIDES), boxes)
    assert torch.autograd.grad(pooled.sum(), boxes, allow_unused=True) == (None,)
