"""Selective query recollection (SQR, arXiv 2212.07593): the proposals each stage refines.

In training, the stages of a cascade also refine proposals as earlier stages left them. Late stages
then see proposals of all degrees of refinement and get most of the supervision.

A group is one full set of proposals. Groups are numbered in the order they are made: group 0 is the
initial one, then come the outputs of the stages. A window is the range of groups a stage refines,
each to one new group. The last group of every stage is the plain cascade, which inference runs.

Notation: ``G`` groups.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from detectron2.config import CfgNode
from torch import Tensor


class Window(NamedTuple):
    """Groups that a stage refines, from `first` up to and excluding `stop`."""

    first: int
    stop: int


def plain_windows(num_stages: int) -> tuple[Window, ...]:
    """Every stage refines the group of the stage before."""
    return tuple(Window(t, t + 1) for t in range(num_stages))


def recollection_windows(
    num_stages: int, *, num_plain_stages: int = 1, dense: bool = False
) -> tuple[Window, ...]:
    """Windows of SQR or of dense query recollection (section 3).

    Args:
        num_stages: ``S``.
        num_plain_stages: from 1 to ``S``, which is the plain cascade; every later stage refines the
            outputs of the two stages before it. Not used if `dense`.
        dense: every stage refines the initial group and the outputs of all stages before.
    """
    first_group = [0, 1]  # of the initial proposals, then of the output of each stage
    windows = []
    for stage in range(1, num_stages + 1):
        source = stage - 2 if stage > num_plain_stages else stage - 1
        first = 0 if dense else first_group[source]
        windows.append(Window(first, first_group[stage]))
        first_group.append(first_group[stage] + first_group[stage] - first)
    return tuple(windows)


def build_windows(cfg: CfgNode) -> tuple[Window, ...]:
    """Windows by ``SQR.MODE`` and ``SQR.START``; the caller checks ``SQR.ENABLED``."""
    stages, node = cfg.MODEL.SparseRCNN.NUM_HEADS, cfg.MODEL.SparseRCNN.SQR
    dense = node.MODE == "dense"
    return recollection_windows(stages, num_plain_stages=node.START, dense=dense)


def routes_of(windows: Sequence[Window]) -> list[list[tuple[int, ...]]]:
    """The stages, counted from 1, that each output group of each stage went through."""
    groups: list[tuple[int, ...]] = [()]
    by_stage = []
    for number, window in enumerate(windows, start=1):
        routes = [(*groups[i], number) for i in range(*window)]
        groups += routes
        by_stage.append(routes)
    return by_stage


class GroupMemory:
    """The groups of one pass through the cascade, kept as long as a later stage needs them."""

    def __init__(
        self, windows: Sequence[Window], boxes: Tensor, features: Tensor, *, detach: bool = True
    ) -> None:
        """Begin with the initial group: boxes (B, 1, P, 4) and features (B, 1, P, D).

        `detach` is False where all stages share the initial boxes, and all train them.
        """
        self.windows, self._detach = windows, detach
        self._blocks: list[tuple[int, Tensor, Tensor]] = [(0, boxes, features)]
        self._count = 1

    def window(self, stage: int) -> tuple[Tensor, Tensor]:
        """Return the input of `stage`, 0-based: boxes (B, G, P, 4) and features (B, G, P, D)."""
        window = range(*self.windows[stage])  # of whole outputs of stages
        parts = [(boxes, features) for first, boxes, features in self._blocks if first in window]
        if len(parts) == 1:  # the plain cascade copies nothing
            return parts[0]
        boxes, features = (torch.cat(x, dim=1) for x in zip(*parts, strict=True))
        return boxes, features

    def add(self, stage: int, boxes: Tensor, features: Tensor) -> None:
        """Store the output of `stage`, 0-based; features carry gradients on, boxes do not.

        Initial boxes get gradients from the first stage only, as in the DAB-DETR port of SQR.
        """
        if stage == 0 and self._detach:
            _, first_boxes, first_features = self._blocks[0]
            self._blocks[0] = (0, first_boxes.detach(), first_features)
        boxes = boxes.detach() if self._detach else boxes
        self._blocks.append((self._count, boxes, features))
        # Not in place: while tracing, sizes are tensors, and the stored count would change as well.
        self._count = self._count + int(boxes.shape[1])
        oldest = min((w.first for w in self.windows[stage + 1 :]), default=self._count)
        self._blocks = [b for b in self._blocks if b[0] + b[1].shape[1] > oldest]
