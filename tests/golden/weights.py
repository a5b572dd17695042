"""Weights and inputs that can be rebuilt on any machine.

Every tensor is drawn from a generator seeded by the CRC-32 of its name, so a state dict follows
from its keys and shapes alone. The stored numbers beside this file are the official model's outputs
for these weights and inputs (torch 2.15, CPU, float32).
"""

import zlib

import torch
from detectron2.structures import Boxes, Instances


def _generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def weight(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Value of one entry of a state dict."""
    draw = torch.randn(shape, generator=_generator(key))
    if key.endswith("init_proposal_boxes.weight"):
        center = 0.5 + 0.15 * draw[:, :2].tanh()
        return torch.cat([center, 0.15 + 0.1 * draw[:, 2:].sigmoid()], dim=1)
    offsets = {"running_var": 1.0 + 0.1 * draw.abs(), "running_mean": 0.1 * draw}
    offsets |= {"class_logits.bias": -2.0 + 0.1 * draw, "bias": 0.02 * draw}
    for ending, value in offsets.items():
        if key.endswith(ending):
            return value
    if len(shape) == 1:
        return 1.0 + 0.1 * draw
    if key.endswith("bboxes_delta.weight"):
        return 0.02 * draw
    fan_in = draw[0].numel()
    return draw * (2.0 / fan_in) ** 0.5 if key.startswith("backbone") else draw / fan_in**0.5


def fill(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Replace every floating-point entry of a state dict."""
    return {k: weight(k, tuple(v.shape)) if v.is_floating_point() else v for k, v in state.items()}


def inputs(name: str, sizes: list, counts: list[int], classes: int) -> list[dict]:
    """Model inputs of the stored run `name`."""
    batch = []
    for index, ((height, width), count) in enumerate(zip(sizes, counts, strict=True)):
        generator = _generator(f"{name}/gt{index}")
        size = torch.tensor([width, height], dtype=torch.float32)
        corner = torch.rand(count, 2, generator=generator) * size * 0.6
        extent = torch.rand(count, 2, generator=generator) * size * 0.3 + 8
        instances = Instances((height, width))
        instances.gt_classes = torch.randint(0, classes, (count,), generator=generator)
        instances.gt_boxes = Boxes(torch.cat([corner, torch.minimum(corner + extent, size)], 1))
        generator = _generator(f"{name}/image{index}")
        shape = (3, height, width)
        image = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        batch.append({"image": image, "instances": instances, "height": height, "width": width})
    return batch
