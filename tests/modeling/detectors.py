"""Options, training steps and inputs for the tests of sparse detectors."""

import torch
from conftest import tiny_cfg
from detectron2.modeling import build_model

from dsrcnn.config import read_cfg
from dsrcnn.modeling.decoder import StageSettings
from dsrcnn.modeling.proposals import DynamicProposals, TemperatureSchedule

SIZES = [(64, 96), (96, 64)]
SETTINGS = StageSettings(
    channels=16, num_logits=3, attention_heads=2, feedforward_channels=32, num_cls=1, num_reg=1,
    activation="relu",
)  # fmt: skip


def options(*opts):
    """Keys of ``MODEL.SparseRCNN`` without that prefix, and values."""
    return [f"MODEL.SparseRCNN.{x}" if i % 2 == 0 else x for i, x in enumerate(opts)]


def enable(part, *opts):
    """Switch DLA, DPG or SQR on; `opts` are keys without prefix and values."""
    keys = [f"{part}.{x}" if i % 2 == 0 else x for i, x in enumerate(opts)]
    return options(f"{part}.ENABLED", True, *keys)


DLA, DPG, SQR = enable("DLA"), enable("DPG", "HIDDEN", 16), enable("SQR")


def model_of(*opts, seed=0):
    """A tiny detector with the same weights for the same options."""
    torch.manual_seed(seed)
    return build_model(tiny_cfg(*opts))


def deformable_detr_of(*opts, seed=0):
    """Its quick model on a CPU with eight queries and five classes."""
    small = options("NUM_CLASSES", 5, "NUM_PROPOSALS", 8)
    torch.manual_seed(seed)
    return build_model(
        read_cfg("quick/deformable_detr_shapes", ["MODEL.DEVICE", "cpu", *small, *opts])
    )


def train_step(model, inputs):
    """Losses, after checking that they are finite and that every parameter gets a gradient."""
    losses = model(inputs)
    sum(losses.values()).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(torch.isfinite(v) for v in losses.values())
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trained)
    return losses


def source(**kwargs):
    """Dynamic proposals of six boxes and eight channels."""
    torch.manual_seed(0)
    defaults = {"num_proposals": 6, "channels": 8, "hidden": 16, "resize": 5, "norm": "none"}
    defaults |= {"temperature": TemperatureSchedule(1.0, 1.0, 0)}
    return wake(DynamicProposals(**{**defaults, **kwargs}))


def wake(proposals):
    """Let the mixtures of images differ, as after training; at the start they are equal."""
    torch.nn.init.normal_(proposals.fc2.weight)
    return proposals


def pyramid(images=2, height=64, width=96, channels=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = [(images, channels, height // s, width // s) for s in (4, 8, 16, 32)]
    return [torch.randn(s, generator=g) for s in shapes]


def sizes(images=2, height=64, width=96):
    return torch.tensor([[width, height, width, height]] * images, dtype=torch.float32)


def weights_of(proposals, features, image_sizes):
    return proposals.mixing_weights(proposals.logits(features, image_sizes))
