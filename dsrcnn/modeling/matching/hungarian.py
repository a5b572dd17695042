"""One-to-one assignment (DETR's and Sparse R-CNN's bipartite matching, solved on the host)."""

import math
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ...structures import Targets
from .costs import CostSettings
from .matcher import MATCHER_REGISTRY, Matcher

__all__ = ["HungarianMatcher", "assign_one_to_one"]


def assign_one_to_one(cost: Tensor, mask: Tensor) -> Tensor:
    """Cheapest one-to-one assignment of each of R independent problems.

    With more ground truths than proposals every proposal gets one and the rest stays unassigned.

    Args:
        cost: (R, M, P), finite where `mask` is True.
        mask: (R, M) bool, True for real ground truths.

    Returns:
        (R, P) int64 on the device of `cost`: index of the ground truth, -1 for background.
    """
    # The only transfer of a training step: costs of all stages and images, with the mask inside.
    host = cost.masked_fill(~mask.unsqueeze(-1), math.inf).cpu().numpy()
    assignment = np.full((host.shape[0], host.shape[2]), -1, dtype=np.int64)
    for row, problem in zip(assignment, host, strict=True):
        real = np.flatnonzero(np.isfinite(problem[:, 0]))
        objects, proposals = linear_sum_assignment(problem[real])
        row[proposals] = real[objects]
    return torch.from_numpy(assignment).to(cost.device)


@MATCHER_REGISTRY.register()
class HungarianMatcher(Matcher):
    """One proposal per ground truth, chosen anew for every stage and image."""

    @configurable
    def __init__(self, *, costs: CostSettings) -> None:
        """Set how costs are computed."""
        super().__init__(costs=costs)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read `MODEL.SparseRCNN`."""
        return {"costs": CostSettings.from_config(cfg)}

    def assign(self, cost: Tensor, iou: Tensor, stage: Tensor, targets: Targets) -> Tensor:
        """See `assign_one_to_one`."""
        mask = targets.mask.expand(len(cost), -1, -1).flatten(0, 1)
        return assign_one_to_one(cost.flatten(0, 1), mask).view(*cost.shape[:2], -1)
