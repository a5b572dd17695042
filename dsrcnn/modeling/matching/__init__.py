"""Which proposal learns which ground truth: costs and assignments, without heads or proposals."""

from .costs import pairwise_costs
from .hungarian import HungarianMatcher, assign_one_to_one

__all__ = ["HungarianMatcher", "assign_one_to_one", "pairwise_costs"]
