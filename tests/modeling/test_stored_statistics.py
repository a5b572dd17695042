"""Batch norms of the backbone that train with stored statistics."""

import copy
import pickle

import pytest
import torch
from conftest import batch, tiny_cfg
from torch.nn.modules.batchnorm import _BatchNorm

from dsrcnn.engine.trainer import Trainer
from dsrcnn.errors import ConfigError

ON = ["MODEL.BACKBONE.NORM_EVAL", True, "MODEL.RESNETS.NORM", "BN"]


def test_statistics_stay_and_factors_learn():
    model = Trainer.build_model(tiny_cfg(*ON)).train()
    norms = [m for m in model.backbone.modules() if isinstance(m, _BatchNorm)]
    before = copy.deepcopy([m.running_mean for m in norms])
    assert norms
    assert not any(m.training for m in norms)
    assert model.training
    sum(model(batch([(64, 96), (96, 64)], [2, 1])).values()).backward()
    assert all(map(torch.equal, before, [m.running_mean for m in norms]))
    learned = [m for m in norms if m.weight.requires_grad]
    assert learned
    assert all(m.weight.grad.abs().sum() > 0 for m in learned)


def test_outputs_are_those_of_frozen_norms_and_copies_stay_so():
    model = Trainer.build_model(tiny_cfg(*ON))
    frozen = Trainer.build_model(tiny_cfg())
    frozen.load_state_dict(model.state_dict(), strict=False)
    images = torch.randn(1, 3, 64, 96)
    copied = copy.deepcopy(model).train()
    expected = frozen.train().backbone(images)["p3"]
    for each in (model.train(), copied):
        torch.testing.assert_close(each.backbone(images)["p3"], expected, rtol=1e-4, atol=1e-5)


def test_a_model_can_be_pickled():
    model = Trainer.build_model(tiny_cfg(*ON))
    again = pickle.loads(pickle.dumps(model)).train()
    norms = [m for m in again.backbone.bottom_up.modules() if isinstance(m, _BatchNorm)]
    assert norms
    assert not any(m.training for m in norms)
    images = torch.randn(1, 3, 64, 96)
    expected = model.train().backbone(images)
    torch.testing.assert_close(again.backbone(images), expected)


def test_norms_of_the_pyramid_collect_statistics():
    model = Trainer.build_model(tiny_cfg(*ON, "MODEL.FPN.NORM", "BN")).train()
    norms = [m for m in model.backbone.bottom_up.modules() if isinstance(m, _BatchNorm)]
    others = [m for m in model.backbone.modules() if isinstance(m, _BatchNorm) and m not in norms]
    assert others
    assert not any(m.training for m in norms)
    assert all(m.training for m in others)


def test_frozen_parts_stay_frozen():
    model = Trainer.build_model(tiny_cfg(*ON, "MODEL.BACKBONE.FREEZE_AT", 2))
    kinds = {type(m).__name__ for m in model.backbone.bottom_up.stem.modules()}
    assert "FrozenBatchNorm2d" in kinds


def test_a_backbone_without_such_norms_is_refused():
    with pytest.raises(ConfigError, match=r"MODEL\.BACKBONE\.NORM_EVAL.*NORM BN.*TIMM\.NORM"):
        Trainer.build_model(tiny_cfg("MODEL.BACKBONE.NORM_EVAL", True))
