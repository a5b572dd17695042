"""What the tests of DPG share."""

import pytest
import torch
from conftest import tiny_cfg

from dsrcnn.modeling.proposals import DynamicProposals, TemperatureSchedule

DPG = ["MODEL.SparseRCNN.DPG.ENABLED", True, "MODEL.SparseRCNN.DPG.HIDDEN", 16]
SIZES = [(64, 96), (96, 64)]


def dpg(*opts):
    return tiny_cfg(*DPG, *opts)


def source(**kwargs):
    defaults = {"num_proposals": 6, "channels": 8, "hidden": 16, "resize": 5, "norm": "none"}
    defaults |= {"temperature": TemperatureSchedule(1.0, 1.0, 0), "logit_norm": False}
    return DynamicProposals(**{**defaults, **kwargs})


def pyramid(images=2, height=64, width=96, channels=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = [(images, channels, height // s, width // s) for s in (4, 8, 16, 32)]
    return [torch.randn(s, generator=g) for s in shapes]


def sizes(images=2, height=64, width=96):
    return torch.tensor([[width, height, width, height]] * images, dtype=torch.float32)


@pytest.fixture(autouse=True)
def _same_start(monkeypatch):
    original = DynamicProposals.__init__
    monkeypatch.setattr(
        DynamicProposals, "__init__", lambda *a, **k: (torch.manual_seed(0), original(*a, **k))[1]
    )
