"""A cascade of four stages with recollection, and inputs for it that need no backbone."""

import torch
from conftest import batch, tiny_cfg
from detectron2.modeling import build_model

from dsrcnn.modeling.meta_arch.base import image_sizes, pad_targets
from dsrcnn.structures import Proposals

SIZES = [(64, 96), (96, 64), (64, 64), (96, 96)]
STAGES = 4
PLAIN = ("MODEL.SparseRCNN.NUM_HEADS", STAGES, "MODEL.SparseRCNN.NUM_PROPOSALS", 7)
DLA = ("MODEL.SparseRCNN.DLA.ENABLED", True)


def sqr(*opts):
    """Options of recollection, after those of the plain cascade; `opts`: its keys and values."""
    prefix = "MODEL.SparseRCNN.SQR."
    own = [f"{prefix}{x}" if isinstance(x, str) and x.isupper() else x for x in opts]
    return (*PLAIN, f"{prefix}ENABLED", True, f"{prefix}START", 1, *own)


def model_of(*opts):
    """The same weights every time, in float64."""
    torch.manual_seed(0)
    return build_model(tiny_cfg(*opts)).double()


def inputs_of(model, images):
    """Features, proposals and targets that need no backbone: leaves to differentiate by."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.rand(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    features = [draw(images, 32, 24 // 2**i, 24 // 2**i).requires_grad_() for i in range(4)]
    corner = draw(images, 7, 2) * 50
    boxes = torch.cat([corner, corner + 8 + draw(images, 7, 2) * 40], dim=-1).requires_grad_()
    states = (draw(images, 7, 32) - 0.5).requires_grad_()
    return features, Proposals(boxes, states)


def losses_of(model, predictions, images):
    """Of the first image 2 objects, then 3, 0, 1."""
    records = batch([(96, 96)] * images, [(i + 2) % 4 for i in range(images)])
    sizes = image_sizes([(96, 96)] * images, model.device).double()
    targets = pad_targets(records, sizes)
    return model.criterion(predictions, targets, model.matcher(predictions, targets))


def gradients(model, loss, leaves):
    """By leaves and by all parameters of the cascade."""
    model.zero_grad()
    wanted = [*leaves, *(p for p in model.head.parameters())]
    return torch.autograd.grad(loss, wanted, allow_unused=True)
