"""The log of recollection: the losses of the plain cascade, comparable to those of other runs."""

import pytest
import torch
from conftest import batch, tiny_cfg
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

SIZES = [(64, 96), (96, 64)]
SQR = ("MODEL.SparseRCNN.SQR.ENABLED", True)
DLA = ("MODEL.SparseRCNN.DLA.ENABLED", True)


def model_of(*opts):
    torch.manual_seed(0)
    return build_model(tiny_cfg("MODEL.SparseRCNN.NUM_HEADS", 4, *opts)).double().train()


@pytest.mark.parametrize("matching", [(), DLA], ids=["Hungarian", "DLA"])
def test_the_log_has_the_losses_of_the_plain_cascade(matching):
    inputs = batch(SIZES, [3, 2])
    expected = model_of(*matching)(inputs)
    with EventStorage(19) as storage:
        model_of(*SQR, *matching)(inputs)
    logged = {k: v for k, (v, _) in storage.latest().items() if k.startswith("plain/")}
    assert logged.pop("plain/total_loss") == pytest.approx(sum(expected.values()).item())
    assert logged == {f"plain/{k}": pytest.approx(v.item()) for k, v in expected.items()}


@pytest.mark.parametrize("matching", [(), DLA], ids=["Hungarian", "DLA"])
def test_the_log_of_a_batch_in_parts_is_that_of_the_whole(matching):
    inputs = batch([SIZES[0]] * 2, [3, 2])  # one size, or parts are padded less
    parts = [[x] for x in inputs]
    expected = model_of(*matching)(inputs)
    model = model_of(*SQR, *matching)
    for _ in range(2):  # an iteration forgets those before
        with EventStorage(19) as storage:
            normalizers = model.loss_normalizers(parts)
            for part in parts:
                model(part, normalizers=normalizers, ends_iteration=part is parts[-1])
    logged = {k: v for k, (v, _) in storage.latest().items() if k.startswith("plain/")}
    assert logged.pop("plain/total_loss") == pytest.approx(sum(expected.values()).item())
    assert logged == {f"plain/{k}": pytest.approx(v.item()) for k, v in expected.items()}


def test_the_log_is_written_in_turn_only():
    with EventStorage(5) as storage:
        model_of(*SQR)(batch(SIZES, [3, 2]))
    assert not storage.latest()
