"""Which proposals a stage refines: those of the stage before, or also recollected ones.

Selective query recollection (SQR, arXiv 2212.07593) lets the stages of a cascade, in training,
refine proposals as earlier stages left them, too. The last stages then see proposals of all degrees
of refinement, and get most of the supervision.

A group is one full set of proposals. All groups so far are numbered in the order in which they came
to be: group 0 is the initial one, then come the outputs of the stages. A window is the range of
groups a stage refines, each to one new group. The last group of every stage is the plain cascade.

Letters: ``B`` images, ``G`` groups, ``P`` proposals, ``D`` channels, ``S`` stages.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from detectron2.config import CfgNode
from torch import Tensor

from ...errors import ConfigError
from ...structures import Predictions, Targets
from ...utils.distributed import mean_over_processes
from ...utils.events import storage_in_turn
from ..losses import LossCounts, SetCriterion

__all__ = [
    "GroupMemory",
    "RecollectionLog",
    "Window",
    "build_windows",
    "check_windows",
    "plain_sets",
    "plain_windows",
    "recollection_windows",
    "routes_of",
]


class Window(NamedTuple):
    """Groups that a stage refines: from `start` up to, without, `end`."""

    start: int
    end: int


def plain_windows(num_stages: int) -> tuple[Window, ...]:
    """Every stage refines the group of the stage before."""
    return tuple(Window(t, t + 1) for t in range(num_stages))


def recollection_windows(
    num_stages: int, *, start: int = 1, dense: bool = False
) -> tuple[Window, ...]:
    """Windows of SQR, or of dense recollection (section 3 of the paper).

    Args:
        num_stages: ``S``.
        start: stages up to this one (counted from 1) are plain; each later one refines what the
            two stages before it put out. ``S`` is the plain cascade. Not used if `dense`.
        dense: every stage refines the initial group and the outputs of all stages before.
    """
    begin = [0, 1]  # number of the first group that each stage put out; stage 0 is the initial one
    windows = []
    for stage in range(1, num_stages + 1):
        first = 0 if dense else begin[max(stage - 2, 0)] if stage > start else begin[stage - 1]
        windows.append(Window(first, begin[stage]))
        begin.append(begin[stage] + windows[-1].end - windows[-1].start)
    return tuple(windows)


def build_windows(cfg: CfgNode) -> tuple[Window, ...]:
    """Windows of `MODEL.SparseRCNN.SQR`, whether it is switched on or not.

    Raises:
        ConfigError: if its `WINDOWS` are not those of a cascade, see `check_windows`.
    """
    node = cfg.MODEL.SparseRCNN
    if node.SQR.WINDOWS:
        return check_windows(node.SQR.WINDOWS, node.NUM_HEADS)
    dense = node.SQR.MODE == "dense"
    return recollection_windows(node.NUM_HEADS, start=node.SQR.START, dense=dense)


def check_windows(pairs: Sequence[Sequence[int]], num_stages: int) -> tuple[Window, ...]:
    """Windows from pairs of numbers, as written in a config.

    Raises:
        ConfigError: unless there is one for every stage, none is empty, and each ends with the last
            group there is, which is the plain cascade.
    """
    key = "MODEL.SparseRCNN.SQR.WINDOWS"
    if len(pairs) != num_stages:
        raise ConfigError(
            f"{key} has {len(pairs)} windows; write one for each of the {num_stages} stages "
            "(MODEL.SparseRCNN.NUM_HEADS)."
        )
    windows, available = [], 1
    for number, pair in enumerate(pairs, start=1):
        is_pair = isinstance(pair, Sequence) and len(pair) == 2
        if not (is_pair and all(isinstance(number, int) for number in pair)):
            raise ConfigError(
                f"{key} has {pair!r} for stage {number}; write [start, end], whole numbers."
            )
        if pair[1] != available or not 0 <= pair[0] < available:
            raise ConfigError(
                f"{key} has {list(pair)} for stage {number}; write [start, {available}] with a "
                f"start from 0 to {available - 1}: {available} groups are there before that stage, "
                "and the last of them must be refined."
            )
        windows.append(Window(*pair))
        available += pair[1] - pair[0]
    return tuple(windows)


def routes_of(windows: Sequence[Window]) -> list[list[tuple[int, ...]]]:
    """The stages that each output group of each stage went through, counted from 1."""
    groups: list[tuple[int, ...]] = [()]
    by_stage = []
    for number, window in enumerate(windows, start=1):
        routes = [(*groups[i], number) for i in range(*window)]
        groups += routes
        by_stage.append(routes)
    return by_stage


def plain_sets(predictions: Predictions) -> list[int]:
    """Which of the prediction sets are the plain cascade: the last one of every stage."""
    stages = predictions.stage.tolist()
    return [i for i, stage in enumerate(stages) if stage not in stages[i + 1 :]]


class GroupMemory:
    """The groups of one pass through the cascade, as long as a later stage wants them."""

    def __init__(
        self, windows: Sequence[Window], boxes: Tensor, features: Tensor, detach_first: bool = True
    ) -> None:
        """Begin with the initial group.

        Args:
            windows: of all stages.
            boxes: (B, 1, P, 4).
            features: (B, 1, P, D).
            detach_first: whether initial boxes get gradients from the first stage only, as between
                all other stages.
        """
        self.windows = windows
        self.detach_first = detach_first
        self._blocks: list[tuple[int, Tensor, Tensor]] = [(0, boxes, features)]
        self._count = 1

    def window(self, stage: int) -> tuple[Tensor, Tensor]:
        """What `stage`, counted from 0, refines: boxes (B, G, P, 4) and features (B, G, P, D)."""
        start, end = self.windows[stage]
        parts = [
            (_cut(boxes, first, start, end), _cut(features, first, start, end))
            for first, boxes, features in self._blocks
            if first < end and first + boxes.shape[1] > start
        ]
        if len(parts) == 1:  # the plain cascade copies nothing
            return parts[0]
        boxes, features = (torch.cat(x, dim=1) for x in zip(*parts, strict=True))
        return boxes, features

    def add(self, stage: int, boxes: Tensor, features: Tensor) -> None:
        """Take what `stage` put out; boxes carry no gradient on, features do."""
        if stage == 0 and self.detach_first:
            _, first_boxes, first_features = self._blocks[0]
            self._blocks[0] = (0, first_boxes.detach(), first_features)
        self._blocks.append((self._count, boxes.detach(), features))
        self._count += boxes.shape[1]
        oldest = min((w.start for w in self.windows[stage + 1 :]), default=self._count)
        self._blocks = [b for b in self._blocks if b[0] + b[1].shape[1] > oldest]


def _cut(block: Tensor, first: int, start: int, end: int) -> Tensor:
    """Groups of a block (B, G, P, .) that begins with group `first`, from `start` to `end`."""
    low, high = max(start - first, 0), min(end - first, block.shape[1])
    return block if (low, high) == (0, block.shape[1]) else block[:, low:high]


class RecollectionLog:
    """Writes the losses that training without recollection would have, every `period` iterations.

    Names are those of the losses after ``plain/``, with ``plain/total_loss``; they compare with
    another training's, which the sums over groups do not. Those of a batch in parts are added up.
    """

    def __init__(self, period: int) -> None:
        """Set the period in iterations."""
        self.period = period
        self._sums: dict[str, float] = {}  # of the parts of this iteration so far

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "RecollectionLog | None":
        """Read `MODEL.SparseRCNN.SQR`; None where nothing is to be logged."""
        node = cfg.MODEL.SparseRCNN.SQR
        return cls(node.LOG_PERIOD) if node.ENABLED and node.LOG_PERIOD else None

    def __call__(
        self,
        criterion: SetCriterion,
        predictions: Predictions,
        targets: Targets,
        assignment: Tensor,
        normalizers: LossCounts | None = None,
        *,
        ends_iteration: bool = True,
    ) -> None:
        """Log this iteration if it is its turn, with the last part of its batch."""
        storage = storage_in_turn(self.period)
        if storage is None:
            return
        sets = plain_sets(predictions)
        plain = predictions.of_sets(sets)
        if normalizers is not None:
            learners, weight = normalizers
            learners = learners[sets] if learners.dim() else learners
            normalizers = LossCounts(learners, None if weight is None else weight[sets])
        with torch.no_grad():
            losses = criterion(plain, targets, assignment[sets], normalizers)
        means = mean_over_processes(torch.stack(list(losses.values())))
        for name, value in zip(losses, means.tolist(), strict=True):
            self._sums[name] = self._sums.get(name, 0.0) + value
        if ends_iteration:
            scalars = {f"plain/{name}": value for name, value in self._sums.items()}
            total = sum(self._sums.values())
            storage.put_scalars(**scalars, **{"plain/total_loss": total}, smoothing_hint=False)
            self._sums = {}
