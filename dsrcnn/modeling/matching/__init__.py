"""Which proposal learns which ground truth: costs and assignments, without heads or proposals."""

from .assignment import (
    decide_exact,
    decide_rescaled,
    decide_top_units,
    limit_positives,
    repair_unmatched,
)
from .costs import CostSettings, pairwise_costs
from .hungarian import HungarianMatcher, assign_one_to_one
from .matcher import MATCHER_REGISTRY, Matcher, build_matcher
from .optimal_transport import OptimalTransportMatcher
from .simota import SimOTAMatcher, assign_cheapest
from .sinkhorn import assign_exact, column_error, sinkhorn
from .units import UnitRule, assign_units, unit_offsets

__all__ = [
    "MATCHER_REGISTRY",
    "CostSettings",
    "HungarianMatcher",
    "Matcher",
    "OptimalTransportMatcher",
    "SimOTAMatcher",
    "UnitRule",
    "assign_cheapest",
    "assign_exact",
    "assign_one_to_one",
    "assign_units",
    "build_matcher",
    "column_error",
    "decide_exact",
    "decide_rescaled",
    "decide_top_units",
    "limit_positives",
    "pairwise_costs",
    "repair_unmatched",
    "sinkhorn",
    "unit_offsets",
]
