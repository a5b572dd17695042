"""Units: how many proposals each ground truth supplies (arXiv 2205.02101, section 3.1).

A ground truth that many proposals already fit gets many units (dynamic-k estimation), early stages
get fewer than late ones (units-increasing strategy), and some of the proposals stay background
(the 80 % cap) unless there are that many objects.

Notation: ``...`` any leading axes.
"""

from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from torch import Tensor

from .matcher import Matcher


class UnitRule(NamedTuple):
    """Settings of `assign_units`, each of them a key of ``MODEL.SparseRCNN.DLA``.

    Attributes:
        num_stages: ``S``.
        top_q: number of the largest IoUs of a ground truth that are summed.
        static_units: if above 0, replaces the sum of IoUs; `unit_step` still applies.
        unit_step: units subtracted for each stage that follows; 0 for the same in all stages.
        max_positive_fraction: largest fraction of an image's proposals that is positive, unless
            more ground truths need one each.
    """

    num_stages: int
    top_q: int = 8
    static_units: int = 0
    unit_step: float = 0.5
    max_positive_fraction: float = 0.8

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "UnitRule":
        """Read `MODEL.SparseRCNN`."""
        node = cfg.MODEL.SparseRCNN.DLA
        stages, limit = cfg.MODEL.SparseRCNN.NUM_HEADS, node.MAX_POSITIVE_FRACTION
        return cls(stages, node.TOP_Q, node.STATIC_UNITS, node.UNIT_STEP, limit)

    def max_positives(self, proposals: int) -> int:
        """Largest number of positives among `proposals`, at least one."""
        return max(1, int(self.max_positive_fraction * proposals + 1e-6))

    def __call__(self, iou: Tensor, mask: Tensor, stage: Tensor) -> Tensor:
        """Compute units (Q, B, M) int64 by IoUs (Q, B, M, P), `mask` (B, M), and stages (Q,)."""
        return assign_units(
            iou,
            mask.expand(len(iou), -1, -1),
            offset=unit_offsets(stage, self.num_stages, self.unit_step).view(-1, 1, 1),
            max_positives=self.max_positives(iou.shape[-1]),
            top_q=self.top_q,
            static_units=self.static_units,
        )


def unit_offsets(stage: Tensor, num_stages: int, unit_step: float = 0.5) -> Tensor:
    """Units to subtract at stages (Q,), 0-based: ``unit_step`` times the stages that follow.

    With six stages and the paper's step these are 2.5, 2, 1.5, 1, 0.5 and 0, (Q,) float32.
    """
    return unit_step * (num_stages - 1 - stage).float()


def assign_units(
    iou: Tensor,
    mask: Tensor,
    *,
    offset: Tensor | float = 0.0,
    max_positives: int,
    top_q: int = 8,
    static_units: int = 0,
) -> Tensor:
    """Estimate the units, subtract the stage's offset, cap, round down, at least 1.

    The cap scales all ground truths of an image by one factor. Since every ground truth gets at
    least 1 after it, a crowd may still exceed the cap; then the units beyond the first are scaled
    down. A crowd of more than ``max_positives`` gets 1 each: to learn an object as background costs
    more than a few negatives are worth. With more ground truths than proposals, those that fit
    proposals best get 1 and the others 0; ties go to the first.

    Args:
        iou: (..., M, P) with proposals, finite.
        mask: (..., M) bool, True for real ground truths.
        offset: (..., 1) or a number, subtracted for the stage.
        max_positives: largest sum of the units of an image, unless there are more ground truths.
        top_q: number of the largest IoUs that are summed as the estimate; all if there are fewer.
        static_units: replaces the estimate if above 0.

    Returns:
        (..., M) int64, 0 in the padding.
    """
    fit = iou.topk(min(top_q, iou.shape[-1]), dim=-1).values.sum(dim=-1)  # dynamic-k estimate
    estimate = torch.full_like(fit, static_units) if static_units > 0 else fit
    units = _floor(_scale_to(estimate - offset, mask, max_positives)).clamp(min=1)
    room = (max_positives - mask.sum(dim=-1, keepdim=True)).clamp(min=0)
    units = 1 + _floor(_scale_to(units - 1, mask, room))
    order_by_fit = fit.masked_fill(~mask, -1).argsort(dim=-1, descending=True, stable=True)
    supplied = mask & (order_by_fit.argsort(dim=-1) < iou.shape[-1])
    return units.masked_fill(~supplied, 0).long()


class UnitMatcher(Matcher):
    """Base of matchers that give a ground truth as many proposals as it has units."""

    one_to_many = True

    def __init__(self, *, units: UnitRule, **kwargs: Any) -> None:
        """Set the rule for units; other arguments are those of `Matcher`."""
        super().__init__(**kwargs)
        self.units = units

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read `MODEL.SparseRCNN`."""
        return {**super().from_config(cfg), "units": UnitRule.from_config(cfg)}

    def extra_repr(self) -> str:
        """Settings for the printed model."""
        return f"{super().extra_repr()}, {self.units}"


def unit_statistics(units: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Mean and maximum of units (Q, B, M) for ground truths (B, M) bool, (Q,) each, to log."""
    mean = units.sum(dim=(1, 2)) / mask.sum().clamp(min=1)
    return {"units_mean": mean, "units_max": units.amax(dim=(1, 2)).float()}


def _floor(values: Tensor) -> Tensor:
    """Round down, except values that float32 rounding left just below a whole number."""
    return (values + 1e-4).floor()


def _scale_to(values: Tensor, mask: Tensor, limit: Tensor | int) -> Tensor:
    """Scale by one factor per image if the sum over real ground truths exceeds the limit."""
    total = values.clamp(min=0).masked_fill(~mask, 0).sum(dim=-1, keepdim=True)
    factor = (limit / total.clamp(min=1e-6)).clamp(max=1)
    return values * factor
