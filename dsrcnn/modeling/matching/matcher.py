"""What all matchers share, and the registry they are chosen from.

Letters: ``Q`` prediction sets, ``B`` images, ``P`` proposals, ``M`` ground truths, ``S`` stages.
"""

import torch
from detectron2.config import CfgNode
from detectron2.utils.registry import Registry
from torch import Tensor, nn

from ...errors import ConfigError
from ...structures import Predictions, Targets
from ...utils.events import storage_in_turn
from .costs import CostSettings, bounded_costs, pairwise_costs
from .units import UnitRule, unit_statistics

__all__ = ["MATCHER_REGISTRY", "AssignmentLog", "Matcher", "UnitMatcher", "build_matcher"]

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


class UnitMatcher(Matcher):
    """Has units, a repair, and tells about the units in the log."""

    def __init__(self, *, costs: CostSettings, units: UnitRule, repair: int) -> None:
        """Set what all of them have.

        Args:
            costs: how costs are computed.
            units: how many proposals a ground truth supplies.
            repair: passes of `repair_unmatched`.
        """
        super().__init__(costs=costs)
        self.units = units
        self.repair = repair

    def extra_repr(self) -> str:
        """Settings for the printed model."""
        return f"{super().extra_repr()}, {self.units}, repair={self.repair}"

    @torch.no_grad()
    def statistics(
        self, predictions: Predictions, targets: Targets, assignment: Tensor
    ) -> dict[str, Tensor]:
        """Adds the units (`unit_statistics`) and what `plan_statistics` tells."""
        found = super().statistics(predictions, targets, assignment)
        if targets.mask.shape[1] == 0:
            return found
        cost, iou = self.finite_costs(predictions, targets)
        units = self.units(iou, targets.mask, predictions.stage)
        found |= unit_statistics(units, targets.mask)
        return found | self.plan_statistics(cost, units, targets.mask)

    def plan_statistics(self, cost: Tensor, units: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """What a matcher has to tell beyond units: nothing, unless it says otherwise.

        Args:
            cost: (Q, B, M, P), finite.
            units: (Q, B, M).
            mask: (B, M) bool.

        Returns:
            Tensors (Q,) by name.
        """
        return {}


class AssignmentLog:
    """Writes a matcher's statistics into Detectron2's event storage, every `period` iterations.

    They are computed for the log alone, and read from the device in one transfer: iterations in
    between pay nothing. Names are ``dla/<statistic>_<stage>``, stages counted from 0 as in the
    losses, and ``dla/<statistic>`` for the last one.
    """

    def __init__(self, period: int, num_stages: int) -> None:
        """Set the period in iterations and the number of stages."""
        self.period = period
        self.num_stages = num_stages

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "AssignmentLog | None":
        """Read `MODEL.SparseRCNN.DLA`; None where nothing is to be logged."""
        node = cfg.MODEL.SparseRCNN
        if not (node.DLA.ENABLED and node.DLA.LOG_PERIOD):
            return None
        return cls(node.DLA.LOG_PERIOD, node.NUM_HEADS)

    def __call__(
        self, matcher: Matcher, predictions: Predictions, targets: Targets, assignment: Tensor
    ) -> None:
        """Log this iteration if it is its turn."""
        storage = storage_in_turn(self.period)
        if storage is None:
            return
        found = matcher.statistics(predictions, targets, assignment)
        stages = predictions.stage.float()
        rows = torch.stack([stages, *(v.float() for v in found.values())]).cpu()
        for stage in range(self.num_stages):
            of_stage = rows[1:, rows[0] == stage]
            if of_stage.shape[1]:
                suffix = "" if stage == self.num_stages - 1 else f"_{stage}"
                means = dict(zip(found, of_stage.mean(dim=1).tolist(), strict=True))
                storage.put_scalars(
                    smoothing_hint=False, **{f"dla/{k}{suffix}": v for k, v in means.items()}
                )
