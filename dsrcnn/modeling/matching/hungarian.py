"""One-to-one assignment (DETR's and Sparse R-CNN's bipartite matching, solved on the host)."""

import math
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from ...structures import Predictions, Targets, TermWeights
from .costs import pairwise_costs

__all__ = ["HungarianMatcher", "assign_one_to_one"]

# Costs that are not finite (a diverging model) rank behind every real cost.
_WORST_COST = 1e8


def assign_one_to_one(cost: Tensor, mask: Tensor) -> Tensor:
    """Cheapest one-to-one assignment of each of R independent problems.

    With more ground truths than proposals every proposal gets one and the rest stays unassigned.

    Args:
        cost: (R, P, M); entries that are not finite rank last.
        mask: (R, M) bool, True for real ground truths.

    Returns:
        (R, P) int64 on the device of `cost`: index of the ground truth, -1 for background.
    """
    finite = torch.nan_to_num(cost, nan=_WORST_COST, posinf=_WORST_COST, neginf=-_WORST_COST)
    # The only transfer of a training step: costs of all stages and images, with the mask inside.
    host = finite.masked_fill(~mask.unsqueeze(1), math.inf).cpu().numpy()
    assignment = np.full(host.shape[:2], -1, dtype=np.int64)
    for row, problem in zip(assignment, host, strict=True):
        real = np.flatnonzero(np.isfinite(problem[0])) if len(problem) else np.empty(0, np.int64)
        proposals, columns = linear_sum_assignment(problem[:, real])
        row[proposals] = real[columns]
    return torch.from_numpy(assignment).to(cost.device)


class HungarianMatcher(nn.Module):
    """One proposal per ground truth, chosen anew for every stage and image."""

    @configurable
    def __init__(
        self, *, weights: TermWeights, focal: bool, alpha: float = 0.25, gamma: float = 2.0
    ) -> None:
        """Set the cost.

        Args:
            weights: of the cost terms.
            focal: focal classification; False for softmax.
            alpha: focal balance.
            gamma: focal exponent.
        """
        super().__init__()
        self.weights = weights
        self.focal = focal
        self.alpha = alpha
        self.gamma = gamma

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read `MODEL.SparseRCNN`; the loss weights are the cost weights, as officially."""
        node = cfg.MODEL.SparseRCNN
        return {
            "weights": TermWeights(node.CLASS_WEIGHT, node.L1_WEIGHT, node.GIOU_WEIGHT),
            "focal": node.USE_FOCAL,
            "alpha": node.ALPHA,
            "gamma": node.GAMMA,
        }

    def extra_repr(self) -> str:
        """Settings for the printed model."""
        return f"weights={tuple(self.weights)}, focal={self.focal}"

    @torch.no_grad()
    def forward(self, predictions: Predictions, targets: Targets) -> Tensor:
        """Assign all prediction sets and images.

        Returns:
            (Q, B, P) int64: index of the ground truth a proposal learns, -1 = background.
        """
        sets, images, proposals = predictions.boxes.shape[:3]
        if targets.mask.shape[1] == 0:  # known on the host: a batch without any ground truth
            return targets.labels.new_full((sets, images, proposals), -1)
        cost = pairwise_costs(
            predictions,
            targets,
            self.weights,
            focal=self.focal,
            alpha=self.alpha,
            gamma=self.gamma,
        )
        mask = targets.mask.expand(sets, -1, -1)
        return assign_one_to_one(cost.flatten(0, 1), mask.flatten(0, 1)).view(sets, images, -1)
