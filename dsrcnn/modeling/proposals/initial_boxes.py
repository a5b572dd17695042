"""Where proposal boxes start before training.

The published model starts them as the whole image; the other modes are what its users asked for.
"""

import math

import torch
from torch import Tensor

from ...errors import ConfigError

__all__ = ["INITIAL_BOXES", "initial_boxes"]

INITIAL_BOXES = ("image", "center", "grid", "random")


def initial_boxes(mode: str, count: int) -> Tensor:
    """Boxes as fractions of the image.

    Args:
        mode: "image": each is the whole image. "center": the middle, half as wide and high. "grid":
            regularly spaced, together covering the image. "random": between two
            points drawn uniformly from the image.
        count: ``P``.

    Returns:
        (P, 4) centre and size.

    Raises:
        ConfigError: for another mode.
    """
    if mode == "image":
        return torch.tensor([0.5, 0.5, 1.0, 1.0]).repeat(count, 1)
    if mode == "center":
        return torch.tensor([0.5, 0.5, 0.5, 0.5]).repeat(count, 1)
    if mode == "grid":
        columns = math.ceil(math.sqrt(count))
        rows = math.ceil(count / columns)
        index = torch.arange(count)
        x = (index % columns + 0.5) / columns
        y = (index // columns + 0.5) / rows
        size = torch.tensor([1 / columns, 1 / rows]).repeat(count, 1)
        return torch.cat([torch.stack([x, y], dim=1), size], dim=1)
    if mode == "random":
        corners = torch.rand(count, 2, 2).sort(dim=1).values
        return torch.cat([corners.mean(dim=1), corners[:, 1] - corners[:, 0]], dim=1)
    raise ConfigError(
        f"MODEL.SparseRCNN.PROPOSALS.BOXES is {mode!r}; write one of {', '.join(INITIAL_BOXES)}."
    )
