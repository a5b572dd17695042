"""One-to-one assignment: bipartite matching of DETR and Sparse R-CNN, solved on the host."""

import math

import numpy as np
import torch
from detectron2.config import configurable
from torch import Tensor

from ...structures import Targets
from ...utils.events import ScalarLog
from .costs import CostSettings
from .matcher import MATCHER_REGISTRY, Matcher, Stats


def assign_one_to_one(cost: Tensor, mask: Tensor) -> Tensor:
    """Solve R independent one-to-one assignments of least cost.

    With more ground truths than proposals every proposal gets one and the rest stays unmatched.

    Args:
        cost: (R, M, P), finite where `mask` is True.
        mask: (R, M) bool, True for real ground truths.

    Returns:
        (R, P) int64 on the device of `cost`: index of the ground truth, -1 for background.
    """
    from scipy.optimize import linear_sum_assignment  # half of the time of `import dsrcnn`

    # One transfer for all problems, with the mask inside; cascades call this once per step.
    host = cost.masked_fill(~mask.unsqueeze(-1), math.inf).cpu().numpy()
    assignment = np.full((host.shape[0], host.shape[2]), -1, dtype=np.int64)
    for row, problem in zip(assignment, host, strict=True):
        real = np.flatnonzero(np.isfinite(problem[:, 0]))
        targets, proposals = linear_sum_assignment(problem[real])
        row[proposals] = real[targets]
    return torch.from_numpy(assignment).to(cost.device)


@MATCHER_REGISTRY.register()
class HungarianMatcher(Matcher):
    """One proposal per ground truth, matched separately for every stage and image."""

    @configurable
    def __init__(
        self, *, costs: CostSettings, log: ScalarLog | None = None, compile_mode: str = ""
    ) -> None:
        super().__init__(costs=costs, log=log, compile_mode=compile_mode)

    def assign(
        self, cost: Tensor, iou: Tensor, stage: Tensor, targets: Targets, stats: Stats = None
    ) -> Tensor:
        """Solve all sets and images, see `assign_one_to_one`."""
        mask = targets.mask.expand(len(cost), -1, -1).flatten(0, 1)
        return assign_one_to_one(cost.flatten(0, 1), mask).view(*cost.shape[:2], -1)
