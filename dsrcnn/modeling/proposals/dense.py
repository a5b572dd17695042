"""Dense distinct queries: proposals from every location of the pyramid (DDQ, arXiv 2303.12776).

Notation: ``N`` locations of all levels in use.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from ...layers.blocks import apply_in_float32, prior_bias
from ...layers.constants import made_once
from ...structures import (
    MAX_LOG_SCALE,
    Predictions,
    Proposals,
    Targets,
    TermWeights,
    at_least_float32,
)
from ..decoder.rcnn_head import stride_of
from ..losses.criterion import LossNormalizers, SetCriterion
from ..matching.costs import CostSettings
from ..matching.hungarian import HungarianMatcher
from ..matching.matcher import Matcher
from ..matching.simota import SimOTAMatcher
from ..matching.units import UnitRule
from ..postprocessing import nms_without_wait
from .build import EXCLUDED_LOGIT, PROPOSALS_REGISTRY, ProposalSource

_BEST = 1000  # best locations that enter NMS, or more where there are more proposals
_THRESHOLD = 0.7  # IoU of NMS
_POSITIVES = 8  # locations that learn a ground truth in the auxiliary loss
_FINEST_STRIDE = 8  # of the levels in use, as in FCOS: stride 4 has three quarters of all locations
_LAYERS = 2  # of a tower
_REACH = 4.0  # strides from a location to each side of an untrained box, half of an anchor of ATSS


class TowerLayer(nn.Module):
    """Depth-wise 3x3 convolution on every level; norm, linear layer and ReLU at every location.

    Norms of whole maps would depend on the padding of the batch.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.norm = nn.LayerNorm(channels)
        self.linear = nn.Linear(channels, channels)
        nn.init.xavier_uniform_(self.linear.weight)

    def forward(
        self, tokens: Tensor, is_outside: Tensor, shapes: Sequence[tuple[int, int]]
    ) -> Tensor:
        """Update tokens (B, N, D), of which those outside of the image (B, N) count as zero.

        `shapes` are height and width of the levels. Returns the same shape.
        """
        tokens = tokens.masked_fill(is_outside.unsqueeze(-1), 0.0)
        levels = tokens.split([height * width for height, width in shapes], dim=1)
        maps = [self.conv(x.mT.unflatten(2, s)) for x, s in zip(levels, shapes, strict=True)]
        return F.relu(self.linear(self.norm(_tokens(maps))))


@made_once
def locations_of(
    shapes: tuple[tuple[int, int], ...], strides: tuple[int, ...], device: torch.device
) -> Tensor:
    """Return ``x, y`` of the centers of all cells in pixels, and their stride, (N, 3)."""
    levels = []
    with torch.inference_mode(False):  # kept for training, too
        for (height, width), stride in zip(shapes, strides, strict=True):
            y = (torch.arange(height, device=device) + 0.5) * stride
            x = (torch.arange(width, device=device) + 0.5) * stride
            center = torch.stack([x.expand(height, -1), y.unsqueeze(1).expand(-1, width)], dim=-1)
            levels.append(F.pad(center, (0, 1), value=stride).flatten(0, 1))
        return torch.cat(levels)


@torch.no_grad()
def select_distinct(
    scores: Tensor, boxes: Tensor, is_outside: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """Select locations with distinct boxes, best first (figure 3a).

    Of the locations with the best scores, class-agnostic NMS leaves the distinct ones. If they are
    fewer than `count`, the best of the suppressed ones follow; if an image has fewer locations than
    that, its selection repeats. Shapes are fixed and the host never waits.

    Args:
        scores: (B, N).
        boxes: (B, N, 4) xyxy in pixels.
        is_outside: (B, N) bool, True for locations outside of the image, which are never selected.
        count: ``P``.

    Returns:
        Indices of locations (B, P), and whether each is distinct, (B, P) bool.
    """
    most = min(max(_BEST, count), scores.shape[1])
    best, index = scores.masked_fill(is_outside, -torch.inf).topk(most, dim=1)
    is_inside = ~is_outside.gather(1, index)
    of_best = boxes.float().gather(1, index.unsqueeze(-1).expand(-1, -1, 4))
    kept = nms_without_wait(best, torch.zeros_like(index), of_best, _THRESHOLD) & is_inside
    rank = torch.arange(most, device=scores.device)
    order = torch.where(kept, rank, rank + most).topk(min(count, most), largest=False).indices
    available = is_inside.sum(dim=1, keepdim=True)
    slot = torch.arange(count, device=scores.device)
    order = order.gather(1, slot % available.clamp(min=1))
    return index.gather(1, order), kept.gather(1, order) & (slot < available)


@PROPOSALS_REGISTRY.register()
class DenseDistinct(ProposalSource):
    """`P` proposals at the best distinct locations of the image (DDQ R-CNN, figure 3b).

    Two light towers, shared by the levels, predict scores and a box at every location. Boxes and
    features of the selected locations are the input of a cascade, for which two stages are enough.
    The selected locations learn one to one, as the stages do. All locations learn one to many, by
    other scores: one score cannot be high and low at a second location of the same object.
    """

    @configurable
    def __init__(
        self,
        *,
        num_proposals: int,
        channels: int,
        num_classes: int,
        strides: Sequence[int],
        prior_probability: float,
        matcher: Matcher,
        criterion: SetCriterion,
        auxiliary_matcher: Matcher,
        auxiliary_criterion: SetCriterion,
    ) -> None:
        """Build the towers.

        Args:
            num_proposals: ``P``.
            channels: ``D``, of proposals and levels.
            num_classes: ``C``.
            strides: of the levels, finest first; that of stride 4 is not read if there are others.
            prior_probability: score of an untrained model.
            matcher: of the selected locations.
            criterion: losses of the selected locations.
            auxiliary_matcher: of all locations.
            auxiliary_criterion: losses of all locations.
        """
        super().__init__()
        self.num_proposals = num_proposals
        self.strides = tuple(s for s in strides if s >= _FINEST_STRIDE) or tuple(strides)
        self.matcher, self.criterion = matcher, criterion
        self.auxiliary_matcher = auxiliary_matcher
        self.auxiliary_criterion = auxiliary_criterion
        self.class_tower = nn.ModuleList(TowerLayer(channels) for _ in range(_LAYERS))
        self.box_tower = nn.ModuleList(TowerLayer(channels) for _ in range(_LAYERS))
        self.class_logits = nn.Linear(channels, num_classes)
        self.auxiliary_logits = nn.Linear(channels, num_classes)
        self.distances = nn.Linear(channels, 4)
        self.projection = nn.Linear(2 * channels, channels)
        nn.init.xavier_uniform_(self.projection.weight)
        prior = prior_bias(prior_probability)
        outputs = [(self.class_logits, prior), (self.auxiliary_logits, prior), (self.distances, 0)]
        for layer, bias in outputs:  # as in RetinaNet, arXiv 1708.02002
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.constant_(layer.bias, bias)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read `MODEL.SparseRCNN` and the levels."""
        node = cfg.MODEL.SparseRCNN
        weights = (node.CLASS_WEIGHT, node.L1_WEIGHT, node.GIOU_WEIGHT)
        one_stage: dict[str, Any] = {"num_stages": 1, "deep_supervision": True, "log": None}
        # Not compiled: three criteria would be more graphs of one function than are kept.
        one_stage |= {"focal": True, "normalizer": "gt", "compile_mode": ""}
        # Soft targets, and a mean over the positives instead of a sum.
        auxiliary = one_stage | {"class_target": "iou"}
        auxiliary["weights"] = TermWeights(*(weight / _POSITIVES for weight in weights))
        costs = CostSettings.from_config(cfg)._replace(focal=True)
        units = UnitRule(1, static_units=_POSITIVES, unit_step=0.0, max_positive_fraction=1.0)
        return {
            "num_proposals": node.NUM_PROPOSALS,
            "channels": node.HIDDEN_DIM,
            "num_classes": node.NUM_CLASSES,
            "strides": [stride_of(name) for name in cfg.MODEL.ROI_HEADS.IN_FEATURES],
            "prior_probability": node.PRIOR_PROB,
            "matcher": HungarianMatcher(costs=costs),
            "criterion": SetCriterion(cfg, **one_stage),
            "auxiliary_matcher": SimOTAMatcher(
                costs=costs._replace(class_target="iou"), units=units
            ),
            "auxiliary_criterion": SetCriterion(cfg, **auxiliary),
        }

    def forward(
        self, features: list[Tensor], sizes: Tensor
    ) -> tuple[Proposals, Predictions | None]:
        """Select proposals in images of `sizes` (B, 4), ``w, h, w, h``.

        Args:
            features: pyramid levels (B, D, H_l, W_l), finest first.
            sizes: of the images before padding, in pixels.

        Returns:
            Boxes (B, P, 4) xyxy in pixels, without gradient, and features (B, P, D). In training,
            predictions for `losses`: those of the selected locations (1, B, P, .), masked where
            they are not distinct, whose candidates are those of all locations (1, B, N, .), masked
            where they are not in the image.
        """
        levels = features[len(features) - len(self.strides) :]
        shapes = tuple((int(x.shape[2]), int(x.shape[3])) for x in levels)
        locations = locations_of(shapes, self.strides, sizes.device)
        is_outside = (locations[:, :2] >= sizes[:, None, :2]).any(dim=-1)
        by_class = by_box = _tokens(levels)
        for of_class, of_box in zip(self.class_tower, self.box_tower, strict=True):
            by_class = of_class(by_class, is_outside, shapes)
            by_box = of_box(by_box, is_outside, shapes)
        logits = apply_in_float32(self.class_logits, by_class)
        boxes = self._boxes(by_box, locations)
        index, is_distinct = select_distinct(
            logits.detach().amax(dim=-1), boxes.detach(), is_outside, self.num_proposals
        )
        selected = index.unsqueeze(-1)
        towers = [x.gather(1, selected.expand(-1, -1, x.shape[-1])) for x in (by_class, by_box)]
        states = at_least_float32(self.projection(torch.cat(towers, dim=-1)))
        of_selected = boxes.gather(1, selected.expand(-1, -1, 4))
        proposals = Proposals(of_selected.detach(), states)
        if not self.training:
            return proposals, None
        auxiliary = at_least_float32(self.auxiliary_logits(by_class))
        everywhere = _masked(auxiliary, boxes, ~is_outside)
        logits = logits.gather(1, selected.expand(-1, -1, logits.shape[-1]))
        distinct = _masked(logits, of_selected, is_distinct)
        return proposals, distinct._replace(candidates=everywhere)

    def losses(
        self, candidates: Predictions, targets: Targets, normalizers: LossNormalizers | None
    ) -> dict[str, Tensor]:
        """Compute the losses of selected and of all locations, ``_dense`` and ``_dense_aux``."""
        everywhere = candidates.candidates
        assert everywhere is not None  # `forward` returns both
        normalizers = normalizers or self.loss_normalizers([targets])
        assignment = self.matcher(candidates, targets)
        main = self.criterion(candidates, targets, assignment, normalizers)
        assignment = self.auxiliary_matcher(everywhere, targets)
        auxiliary = self.auxiliary_criterion(everywhere, targets, assignment, normalizers)
        losses = {f"{name}_dense": value for name, value in main.items()}
        return losses | {f"{name}_dense_aux": value for name, value in auxiliary.items()}

    def loss_normalizers(self, targets: list[Targets]) -> LossNormalizers:
        """Count the ground truths of all parts."""
        return self.criterion.normalizers([self.criterion.count(part) for part in targets])

    def _boxes(self, tokens: Tensor, locations: Tensor) -> Tensor:
        """Predict boxes (B, N, 4) by the distances of their sides from the locations, as FCOS."""
        raw = apply_in_float32(self.distances, tokens)
        center, stride = locations.to(raw.dtype).split([2, 1], dim=-1)
        low, high = (_REACH * stride * raw.clamp(max=MAX_LOG_SCALE).exp()).split(2, dim=-1)
        return torch.cat([center - low, center + high], dim=-1)


def _tokens(levels: Sequence[Tensor]) -> Tensor:
    """Lay out levels (B, D, H_l, W_l) as one sequence (B, N, D), row by row."""
    return torch.cat([x.flatten(2).mT for x in levels], dim=1)


def _masked(logits: Tensor, boxes: Tensor, mask: Tensor) -> Predictions:
    """Pack predictions (B, R, .) as one set, of which only those in `mask` (B, R) have losses."""
    logits = logits.masked_fill(~mask.unsqueeze(-1), EXCLUDED_LOGIT)
    stage = torch.zeros(1, dtype=torch.int64, device=boxes.device)
    return Predictions(logits.unsqueeze(0), boxes.unsqueeze(0), stage, mask)
