import pytest
import torch
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes

from dsrcnn.layers.roi_align import FeatureTable, assign_levels, pool_rois

STRIDES = (4, 8, 16, 32)


def pyramid(images=2, channels=3, height=96, width=160, dtype=torch.float32):
    return [
        torch.randn(images, channels, height // s, width // s, dtype=dtype, requires_grad=True)
        for s in STRIDES
    ]


def random_boxes(images, count, extent):
    centre = torch.rand(images, count, 2) * torch.tensor([160.0, 96.0]) * 1.4 - 20
    size = torch.rand(images, count, 2) * extent
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)


def by_detectron2(features, boxes, cells=7, samples=2, kind="ROIAlignV2"):
    pooler = ROIPooler(cells, tuple(1 / s for s in STRIDES), samples, kind)
    return pooler(features, [Boxes(b) for b in boxes]).flatten(2).transpose(1, 2)


@pytest.mark.parametrize("side", [56.0, 111.9, 112.0, 224.0, 447.0, 448.0, 900.0, 0.0, 1.0])
def test_levels_follow_the_size_of_the_box(side):
    expected = {56.0: 2, 111.9: 2, 112.0: 3, 224.0: 4, 447.0: 4, 448.0: 5, 900.0: 5}
    box = torch.tensor([[0.0, 0.0, side, side]])
    assert assign_levels(box, 4).item() + 2 == expected.get(side, 2)


@pytest.mark.parametrize("extent", [30.0, 150.0, 900.0])
def test_values_equal_the_common_implementation_also_outside_the_image(extent):
    features, boxes = pyramid(), random_boxes(2, 40, extent)
    ours = pool_rois(FeatureTable.from_levels(features, STRIDES), boxes)
    torch.testing.assert_close(ours, by_detectron2(features, boxes), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("extent", [1.0, 30.0, 900.0])
def test_without_the_shift_values_equal_the_first_roi_align(extent):
    features, boxes = pyramid(), random_boxes(2, 40, extent)
    ours = pool_rois(FeatureTable.from_levels(features, STRIDES), boxes, aligned=False)
    expected = by_detectron2(features, boxes, kind="ROIAlign")
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("cells", "samples"), [(7, 2), (3, 1), (5, 3)])
def test_gradients_equal_the_common_implementation(cells, samples):
    features, boxes = pyramid(), random_boxes(2, 30, 300.0)
    wanted = torch.randn(60, cells * cells, 3)
    grads = []
    for pool in (
        lambda f: pool_rois(
            FeatureTable.from_levels(f, STRIDES), boxes, cells=cells, samples=samples
        ),
        lambda f: by_detectron2(f, boxes, cells, samples),
    ):
        grads.append(torch.autograd.grad(pool(features), features, wanted, allow_unused=True))
    for ours, theirs in zip(*grads, strict=True):
        expected = torch.zeros_like(ours) if theirs is None else theirs
        torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-4)


def test_each_image_pools_from_its_own_features():
    features, boxes = pyramid(images=3), random_boxes(3, 4, 200.0)
    together = pool_rois(FeatureTable.from_levels(features, STRIDES), boxes)
    for i in range(3):
        table = FeatureTable.from_levels([f[i : i + 1] for f in features], STRIDES)
        alone = pool_rois(table, boxes[i : i + 1])
        torch.testing.assert_close(together[4 * i : 4 * i + 4], alone)


def test_a_constant_feature_is_pooled_unchanged():
    features = [torch.full((1, 2, 96 // s, 160 // s), 3.0) for s in STRIDES]
    boxes = torch.tensor([[[10.0, 10, 60, 70], [0, 0, 160, 96], [50, 20, 50, 20]]])
    pooled = pool_rois(FeatureTable.from_levels(features, STRIDES), boxes)
    torch.testing.assert_close(pooled, torch.full((3, 49, 2), 3.0))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_boxes_that_are_not_finite_or_huge_neither_crash_nor_spread(value):
    boxes = torch.tensor([[[value, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, value], [1.0, 1, 9, 9]]])
    pooled = pool_rois(FeatureTable.from_levels(pyramid(images=1), STRIDES), boxes)
    assert torch.isfinite(pooled).all()


def test_no_gradient_reaches_the_boxes():
    boxes = random_boxes(2, 4, 100.0).requires_grad_()
    pooled = pool_rois(FeatureTable.from_levels(pyramid(), STRIDES), boxes)
    assert torch.autograd.grad(pooled.sum(), boxes, allow_unused=True) == (None,)
