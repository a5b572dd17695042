"""Costs and assignments: which proposal is assigned to which ground truth.

Nothing here depends on heads or proposals. Importing it registers the matchers.
"""

from .costs import CostSettings, pairwise_costs
from .hungarian import HungarianMatcher, assign_one_to_one
from .matcher import MATCHER_REGISTRY, Matcher, build_matcher
from .optimal_transport import OptimalTransportMatcher, assign_from_plan, limit_positives
from .simota import SimOTAMatcher, assign_cheapest
from .sinkhorn import assign_exact, column_error, sinkhorn
from .units import UnitMatcher, UnitRule, assign_units, unit_offsets

__all__ = [
    "MATCHER_REGISTRY",
    "CostSettings",
    "HungarianMatcher",
    "Matcher",
    "OptimalTransportMatcher",
    "SimOTAMatcher",
    "UnitMatcher",
    "UnitRule",
    "assign_cheapest",
    "assign_exact",
    "assign_from_plan",
    "assign_one_to_one",
    "assign_units",
    "build_matcher",
    "column_error",
    "limit_positives",
    "pairwise_costs",
    "sinkhorn",
    "unit_offsets",
]
