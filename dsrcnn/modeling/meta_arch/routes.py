"""Losses of the auxiliary route: one-to-many beside the one-to-one that inference runs.

After Mr. DETR (arXiv 2412.10028, Route-1). The auxiliary route refines the same proposals by the
same stages, as one more group, and has a feed-forward network of its own in each
(`dsrcnn.modeling.decoder.Stage`). It exists in training only.
"""

from typing import Any

from detectron2.config import CfgNode
from torch import Tensor, nn

from ...config.routes import has_auxiliary_route, with_dla_on_main_route
from ...structures import Predictions, Targets
from ..losses.criterion import LossNormalizers, SetCriterion
from ..matching.matcher import Matcher, build_matcher


class RouteLosses(nn.Module):
    """Matching and losses of the auxiliary route."""

    def __init__(self, *, matcher: Matcher, criterion: SetCriterion) -> None:
        """Set both parts.

        Args:
            matcher: of DLA.
            criterion: with DLA's normalizer.
        """
        super().__init__()
        self.matcher = matcher
        self.criterion = criterion

    def forward(
        self, predictions: Predictions, targets: Targets, normalizers: LossNormalizers | None
    ) -> dict[str, Tensor]:
        """Compute the weighted losses by name, which end with ``_aux``; see `SetCriterion`."""
        assignment = self.matcher(predictions, targets)
        losses = self.criterion(predictions, targets, assignment, normalizers)
        return {f"{name}_aux": value for name, value in losses.items()}


def build_route_losses(cfg: CfgNode, *, l1_of_centers: bool = False) -> RouteLosses | None:
    """Build matcher and criterion of the auxiliary route, which are those of plain DLA.

    Args:
        cfg: of the model.
        l1_of_centers: see `CostSettings`.

    Returns:
        None without an auxiliary route.
    """
    if not has_auxiliary_route(cfg):
        return None
    cfg = with_dla_on_main_route(cfg)
    # `plain/*` in the log is of the main route, and files without this route are complete.
    options: dict[str, Any] = {"l1_of_centers": l1_of_centers, "log": None, "is_stored": False}
    criterion = SetCriterion(cfg, **options)
    return RouteLosses(matcher=build_matcher(cfg, l1_of_centers=l1_of_centers), criterion=criterion)
