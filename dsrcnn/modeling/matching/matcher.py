"""What all matchers share, and the registry they are chosen from.

Letters: ``Q`` prediction sets, ``B`` images, ``P`` proposals, ``M`` ground truths, ``S`` stages.
"""

import torch
from detectron2.config import CfgNode
from detectron2.utils.registry import Registry
from torch import Tensor, nn

from ...errors import ConfigError
from ...structures import Predictions, Targets
from .costs import CostSettings, bounded_costs, pairwise_costs

__all__ = ["MATCHER_REGISTRY", "Matcher", "build_matcher"]

MATCHER_REGISTRY = Registry("MATCHER")
MATCHER_REGISTRY.__doc__ = """
Matchers: which proposal learns which ground truth.

A matcher is built from a config and called as ``matcher(predictions, targets)`` with
`Predictions` and `Targets`. It returns an assignment (Q, B, P) int64: the index of the ground
truth a proposal learns, -1 for background.
"""


class Matcher(nn.Module):
    """Costs first, for all sets and images at once; a subclass turns them into an assignment."""

    def __init__(self, *, costs: CostSettings) -> None:
        """Set how costs are computed."""
        super().__init__()
        self.costs = costs

    def extra_repr(self) -> str:
        """Settings for the printed model."""
        return f"weights={tuple(self.costs.weights)}, focal={self.costs.focal}"

    @torch.no_grad()
    def forward(self, predictions: Predictions, targets: Targets) -> Tensor:
        """Assign all prediction sets and images.

        Returns:
            (Q, B, P) int64: index of the ground truth a proposal learns, -1 = background.
        """
        if targets.mask.shape[1] == 0:  # known on the host: a batch without any ground truth
            return targets.labels.new_full(predictions.boxes.shape[:3], -1)
        return self.assign(*self.finite_costs(predictions, targets), predictions.stage, targets)

    def finite_costs(self, predictions: Predictions, targets: Targets) -> tuple[Tensor, Tensor]:
        """Costs and IoUs (Q, B, M, P), never in half precision, finite whatever the model says."""
        with torch.autocast(predictions.boxes.device.type, enabled=False):
            cost, iou = pairwise_costs(predictions, targets, self.costs)
        return bounded_costs(cost), iou.nan_to_num(nan=0.0)

    def assign(self, cost: Tensor, iou: Tensor, stage: Tensor, targets: Targets) -> Tensor:
        """Turn costs into an assignment.

        Args:
            cost: (Q, B, M, P), finite.
            iou: (Q, B, M, P).
            stage: (Q,) stage of each set.
            targets: for ``mask``: entries of padded ground truths have no meaning.

        Returns:
            (Q, B, P).
        """
        raise NotImplementedError

    @torch.no_grad()
    def statistics(
        self, predictions: Predictions, targets: Targets, assignment: Tensor
    ) -> dict[str, Tensor]:
        """What to log about an assignment, per prediction set.

        Returns:
            ``positives``, proposals that learn an object, and ``unmatched``, ground truths that
            nobody learns: (Q,) each, means over the images.
        """
        objects = torch.arange(targets.mask.shape[1], device=assignment.device)
        learned = (assignment.unsqueeze(-2) == objects.unsqueeze(-1)).any(dim=-1)
        return {
            "positives": (assignment >= 0).sum(dim=-1).float().mean(dim=-1),
            "unmatched": (targets.mask & ~learned).sum(dim=-1).float().mean(dim=-1),
        }


def build_matcher(cfg: CfgNode) -> Matcher:
    """The matcher of ``MODEL.SparseRCNN.DLA``; without DLA one proposal per ground truth.

    Raises:
        ConfigError: if no matcher of the name is registered.
    """
    dla = cfg.MODEL.SparseRCNN.DLA
    name = dla.MATCHER if dla.ENABLED else "HungarianMatcher"
    if name not in MATCHER_REGISTRY:
        known = ", ".join(sorted(member for member, _ in MATCHER_REGISTRY))
        raise ConfigError(f"MODEL.SparseRCNN.DLA.MATCHER is {name!r}; write one of {known}.")
    matcher: Matcher = MATCHER_REGISTRY.get(name)(cfg)
    return matcher
