import pytest
import torch
from conftest import batch, tiny_cfg
from detectron2.modeling import build_model

from dsrcnn.errors import ConfigError
from dsrcnn.modeling.freeze import freeze_modules

TRAINED = ["MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", 0]


def test_frozen_modules_keep_parameters_and_statistics():
    model = build_model(tiny_cfg(*TRAINED))
    freeze_modules(model, ["backbone.bottom_up", "head.head_series.0"])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    sum(model(batch([(64, 64)], [2])).values()).backward()
    optimizer.step()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    frozen = ("backbone.bottom_up.", "head.head_series.0.")
    assert changed
    assert not any(k.startswith(frozen) for k in changed)


def test_frozen_proposals_of_dpg_keep_their_statistics():
    model = build_model(tiny_cfg("MODEL.SparseRCNN.DPG.ENABLED", True))
    freeze_modules(model, ["proposals"])
    before = {k: v.clone() for k, v in model.proposals.state_dict().items()}
    assert any("running_mean" in k for k in before)
    model.train()(batch([(64, 64)] * 4, [2] * 4))
    changed = [k for k, v in model.proposals.state_dict().items() if not torch.equal(v, before[k])]
    assert changed == ["step"]  # of the temperature


def test_an_unknown_module_is_refused_with_similar_names():
    with pytest.raises(ConfigError, match=r"'head.head_serie.1'.*head\.head_series\.1"):
        freeze_modules(build_model(tiny_cfg()), ["head.head_serie.1"])


def test_freezing_everything_is_refused():
    with pytest.raises(ConfigError, match="nothing to train"):
        freeze_modules(build_model(tiny_cfg()), ["backbone", "proposals", "head", "criterion"])


@pytest.mark.parametrize(
    ("opts", "expected"),
    [
        ([], True),
        (["MODEL.SparseRCNN.DEEP_SUPERVISION", False], False),
        (["MODEL.ROI_HEADS.IN_FEATURES", ["p3", "p4", "p5"]], False),
    ],
)
def test_a_model_knows_whether_all_parameters_get_gradients(opts, expected):
    model = build_model(tiny_cfg(*opts))
    sum(model(batch([(64, 64)], [2])).values()).backward()
    reached = all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert reached == model.all_parameters_get_gradients == expected
