"""Base of all matchers, and the registry that selects them."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from detectron2.config import CfgNode
from detectron2.utils.registry import Registry
from torch import Tensor, nn

from ...config.validate import check_name
from ...structures import Predictions, Targets
from ...utils.compilation import compile_mode, in_region
from ...utils.events import ScalarLog
from .costs import WORST_COST, CostSettings, bounded_costs, pairwise_costs

Stats = dict[str, Tensor] | None  # statistics to log by name, None where none are logged

MATCHER_REGISTRY = Registry("MATCHER")
MATCHER_REGISTRY.__doc__ = """
Matchers: which proposal is assigned to which ground truth.

A matcher is a `Matcher`, built from a config and called as ``matcher(predictions, targets)`` with
`Predictions` and `Targets`. It returns an assignment (Q, B, P) int64: the index of the ground truth
a proposal learns, -1 for background. ``MODEL.SparseRCNN.DLA.MATCHER`` selects one.
"""


class Matcher(nn.Module):
    """Compute costs for all prediction sets and images; a subclass turns them into an assignment.

    Attributes:
        one_to_many: whether a ground truth may get several proposals, so that inference needs NMS.
        on_device: whether `assign` is a function of tensors, which can be compiled; False if the
            host computes it.
    """

    one_to_many: ClassVar[bool] = False
    on_device: ClassVar[bool] = False

    def __init__(
        self, *, costs: CostSettings, log: ScalarLog | None = None, compile_mode: str = ""
    ) -> None:
        """Set how costs are computed and compiled, and the log of statistics (``dla/*``)."""
        super().__init__()
        self.costs = costs
        self.log = log or ScalarLog(0)
        self.compile_mode = compile_mode

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read `MODEL.SparseRCNN`; statistics are logged with DLA."""
        period = cfg.LOG.PERIOD if cfg.MODEL.SparseRCNN.DLA.ENABLED else 0
        return {
            "costs": CostSettings.from_config(cfg),
            "log": ScalarLog(period),
            "compile_mode": compile_mode(cfg),
        }

    def extra_repr(self) -> str:
        """Settings for the printed model."""
        return f"weights={tuple(self.costs.weights)}, focal={self.costs.focal}"

    def forward(self, predictions: Predictions, targets: Targets) -> Tensor:
        """Assign each proposal a ground truth: its index (Q, B, P) int64, -1 for background."""
        # Before `no_grad`, inside of which nothing is due.
        stats: Stats = {} if self.log.is_due() else None
        with torch.no_grad():
            if targets.mask.shape[1] == 0:  # known on the host: a batch without any ground truth
                assignment = targets.labels.new_full(predictions.boxes.shape[:3], -1)
            else:
                kind, mode = type(self), self.compile_mode
                cost, iou = in_region(kind.finite_costs, mode)(self, predictions, targets)
                assign = in_region(kind.assign, mode if self.on_device else "")
                assignment = assign(self, cost, iou, predictions.stage, targets, stats)
                if predictions.mask is not None:  # for want of others
                    assignment = assignment.masked_fill(~predictions.mask, -1)
        if stats is not None:
            stats |= _count(assignment, targets)
            self.log.write("dla", _by_stage(stats, predictions.stage))
        return assignment

    def finite_costs(self, predictions: Predictions, targets: Targets) -> tuple[Tensor, Tensor]:
        """Costs and IoUs (Q, B, M, P), never in half precision, finite for any predictions.

        Padded proposals have the highest cost.
        """
        with torch.autocast(predictions.boxes.device.type, enabled=False):
            cost, iou = pairwise_costs(predictions, targets, self.costs)
        cost, iou = bounded_costs(cost), iou.nan_to_num(nan=0.0)
        if predictions.mask is None:
            return cost, iou
        is_padding = ~predictions.mask.unsqueeze(1)
        return cost.masked_fill(is_padding, WORST_COST), iou.masked_fill(is_padding, 0.0)

    def assign(
        self, cost: Tensor, iou: Tensor, stage: Tensor, targets: Targets, stats: Stats = None
    ) -> Tensor:
        """Turn costs into an assignment.

        Args:
            cost: (Q, B, M, P), finite.
            iou: (Q, B, M, P).
            stage: (Q,) stage of each set.
            targets: for ``mask``: entries of padded ground truths have no meaning.
            stats: if not None, a dictionary to fill with tensors (Q,) to log.

        Returns:
            (Q, B, P).
        """
        raise NotImplementedError


def matcher_class(cfg: CfgNode) -> type[Matcher]:
    """Return the matcher class of ``MODEL.SparseRCNN.DLA``, Hungarian matching without DLA.

    Raises:
        ConfigError: if no matcher of the name is registered.
    """
    dla = cfg.MODEL.SparseRCNN.DLA
    name = dla.MATCHER if dla.ENABLED else "HungarianMatcher"
    check_name("MODEL.SparseRCNN.DLA.MATCHER", name, MATCHER_REGISTRY)
    matcher: type[Matcher] = MATCHER_REGISTRY.get(name)
    return matcher


def build_matcher(cfg: CfgNode, *, l1_of_centers: bool = False) -> Matcher:
    """Build the matcher of `matcher_class`; `l1_of_centers` is that of `CostSettings`."""
    build: Callable[..., Matcher] = matcher_class(cfg)  # its constructor is configurable
    if not l1_of_centers:
        return build(cfg)
    return build(cfg, costs=CostSettings.from_config(cfg)._replace(l1_of_centers=True))


def _count(assignment: Tensor, targets: Targets) -> dict[str, Tensor]:
    """Positives, and ground truths without a proposal: (Q,) each, means over the images."""
    index = torch.arange(targets.mask.shape[1], device=assignment.device)
    matched = (assignment.unsqueeze(-2) == index.unsqueeze(-1)).any(dim=-1)
    return {
        "positives": (assignment >= 0).sum(dim=-1).float().mean(dim=-1),
        "unmatched": (targets.mask & ~matched).sum(dim=-1).float().mean(dim=-1),
    }


def _by_stage(statistics: dict[str, Tensor], stage: Tensor) -> dict[str, Tensor]:
    """Reduce over the sets of each stage; ``<name>_<stage>``, ``<name>`` for the last stage."""
    stages = sorted(set(stage.tolist()))
    scalars = {}
    for number in stages:
        suffix = "" if number == stages[-1] else f"_{number}"
        for name, values in statistics.items():
            of_stage = values[stage == number].float()
            largest = name in ("units_max", "column_error")
            scalars[name + suffix] = of_stage.max() if largest else of_stage.mean()
    return scalars
