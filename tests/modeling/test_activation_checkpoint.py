import copy

import pytest
import torch
from conftest import batch, tiny_cfg
from detectron2.modeling import build_model

SIZES = [(64, 96), (96, 64)]
TRAINED = ["MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", 0]
DROPPING = ["MODEL.SparseRCNN.DROPOUT", 0.2]


def step(*opts):
    torch.manual_seed(0)
    model = build_model(tiny_cfg(*TRAINED, *DROPPING, *opts))
    torch.manual_seed(1)
    losses = model(batch(SIZES, [3, 1]))
    sum(losses.values()).backward()
    return losses, [p.grad for p in model.parameters()], model.state_dict()


@pytest.mark.parametrize("parts", [["BACKBONE"], ["STAGES"], ["BACKBONE", "STAGES"]])
def test_checkpointing_changes_neither_losses_nor_gradients_nor_norms_nor_keys(parts):
    losses, gradients, state = step()
    other = step(*(x for part in parts for x in (f"MODEL.CHECKPOINT.{part}", True)))
    assert losses.keys() == other[0].keys()
    for a, b in zip(losses.values(), other[0].values(), strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(gradients, other[1], strict=True):
        torch.testing.assert_close(a, b)
    assert list(state) == list(other[2])
    for key, value in state.items():
        torch.testing.assert_close(value, other[2][key])


def saved_bytes(*opts):
    """Size of what autograd keeps from the forward to the backward pass."""
    model = build_model(tiny_cfg(*TRAINED, *opts))
    kept = {}
    parameters = {p.data_ptr() for p in model.parameters()}

    def keep(x):
        if x.data_ptr() not in parameters:
            kept[x.data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model(batch(SIZES, [3, 1]))
    return sum(kept.values())


def test_checkpointing_keeps_less():
    whole = saved_bytes()
    assert saved_bytes("MODEL.CHECKPOINT.BACKBONE", True) < 0.75 * whole
    many = ["MODEL.SparseRCNN.NUM_PROPOSALS", 100, "MODEL.SparseRCNN.NUM_HEADS", 4]
    assert saved_bytes(*many, "MODEL.CHECKPOINT.STAGES", True) < 0.6 * saved_bytes(*many)


def test_a_copy_of_a_checkpointed_model_is_a_model_of_its_own():
    model = build_model(tiny_cfg(*TRAINED, "MODEL.CHECKPOINT.BACKBONE", True))
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    other.eval()
    boxes = other(batch(SIZES, [1, 1]))[0]["instances"].pred_boxes.tensor
    assert boxes.std() > 0
