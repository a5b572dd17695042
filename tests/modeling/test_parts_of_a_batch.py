"""A batch that comes in parts: gradients must be those of the batch in one piece."""

import pytest
import torch
from conftest import batch, tiny_cfg
from detectron2.modeling import build_model

from dsrcnn.layers.norm import norms_at_rest

SIZES = [(64, 96), (64, 96), (64, 96), (64, 96)]
DLA = ["MODEL.SparseRCNN.DLA.ENABLED", True]
# Without norms over the images of a batch: in parts they see less.
DPG = ["MODEL.SparseRCNN.DPG.ENABLED", True, "MODEL.SparseRCNN.DPG.NORM", "none"]
DPG += ["MODEL.SparseRCNN.DPG.LOGIT_NORM", False]
SQR = ["MODEL.SparseRCNN.SQR.ENABLED", True, "MODEL.SparseRCNN.NUM_HEADS", 4]
VARIANTS = {
    "Hungarian": [],
    "DLA": DLA,
    "DLA, ground truths": [*DLA, "MODEL.SparseRCNN.DLA.NORMALIZER", "gt"],
    "softmax": ["MODEL.SparseRCNN.USE_FOCAL", False],
    "DLA and DPG": [*DLA, *DPG],
    "SQR": SQR,
    "DLA and SQR": [*DLA, *SQR],
}


def gradients(model, parts):
    model.zero_grad()
    normalizers = model.loss_normalizers(parts) if len(parts) > 1 else None
    total = 0.0
    for part in parts:
        losses = model(part, normalizers=normalizers, ends_iteration=False)
        value = sum(losses.values())
        value.backward()
        total += value.item()
    return total, [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("opts", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("counts", [[3, 1, 0, 5], [0, 0, 0, 0]])
def test_four_parts_of_one_image_give_the_gradients_of_four_images(opts, counts):
    model = build_model(tiny_cfg(*opts)).double()
    inputs = batch(SIZES, counts)
    loss, expected = gradients(model, [inputs])
    again, found = gradients(model, [[x] for x in inputs])
    assert again == pytest.approx(loss, rel=1e-6)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * max(1.0, b.abs().max().item()))


def test_counting_beforehand_changes_nothing_in_the_model():
    model = build_model(tiny_cfg(*DLA, "MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", 0))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.loss_normalizers([batch(SIZES[:2], [2, 1]), batch(SIZES[:2], [0, 3])])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_norms_at_rest_normalise_by_the_batch_and_remember_nothing():
    norm = torch.nn.BatchNorm2d(3)
    x = torch.randn(2, 3, 4, 4) * 5 + 2
    with norms_at_rest(norm):
        resting = norm(x)
    assert norm.running_mean.abs().max() == 0
    assert norm.num_batches_tracked == 0
    torch.testing.assert_close(norm(x), resting)
    assert norm.num_batches_tracked == 1
