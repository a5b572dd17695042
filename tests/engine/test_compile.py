import copy

import torch
from conftest import batch, tiny_cfg
from detectron2.modeling import build_model


def test_compiled_stages_give_the_same_numbers_and_keys(monkeypatch):
    original = torch.nn.Module.compile
    # Traced as always, but without a minute of generating and compiling C++.
    monkeypatch.setattr(torch.nn.Module, "compile", lambda m: original(m, backend="aot_eager"))
    plain = build_model(tiny_cfg("MODEL.SparseRCNN.NUM_HEADS", 1))
    compiled = build_model(tiny_cfg("MODEL.SparseRCNN.NUM_HEADS", 1, "MODEL.COMPILE", True))
    assert list(compiled.state_dict()) == list(plain.state_dict())
    compiled.load_state_dict(plain.state_dict())
    results = []
    for model in (plain, compiled, copy.deepcopy(compiled)):
        losses = model(batch([(64, 96)], [2]))
        sum(losses.values()).backward()
        gradients = [p.grad for p in model.head.parameters()]
        results.append((list(losses.values()), gradients))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-4, atol=1e-4)
