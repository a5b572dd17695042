"""What pictures of stages show is what inference computes."""

import pytest
import torch
from conftest import batch, tiny_cfg
from detectron2.modeling import build_model

from dsrcnn.analysis.images import predict_at_every_stage
from dsrcnn.analysis.recollection import stage_that_had_most

SQR = ["MODEL.SparseRCNN.SQR.ENABLED", True]


@pytest.mark.parametrize("opts", [[], SQR, ["MODEL.META_ARCHITECTURE", "AdaMixer"]])
@torch.no_grad()
def test_all_stages_predict_what_they_do_at_inference(opts):
    torch.manual_seed(0)
    stages = ["MODEL.SparseRCNN.NUM_HEADS", 3, "MODEL.SparseRCNN.DROPOUT", 0.5]
    model = build_model(tiny_cfg(*stages, *opts)).eval()
    inputs = batch([(64, 96)], [2])
    last, _, _ = model.predict(inputs)
    predict_at_every_stage(model)
    for _ in range(2):
        predictions, _, _ = model.predict(inputs)
        assert predictions.stage.tolist() == [0, 1, 2]
        assert torch.equal(predictions.logits[2:], last.logits)
        assert torch.equal(predictions.boxes[2:], last.boxes)


@pytest.mark.parametrize(
    ("lost", "expected"),
    [
        ([[1, 1, 0], [0, 1, 0], [1, 0, 1]], 2),
        ([[1, 1, 1], [0, 1, 0], [1, 0, 1]], 0),
        ([[0], [0]], 1),
    ],
)
def test_lost_objects_are_shown_where_most_of_them_were_last_found(lost, expected):
    assert stage_that_had_most(torch.tensor(lost).bool()) == expected
