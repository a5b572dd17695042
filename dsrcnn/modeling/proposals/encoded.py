"""Queries at the best tokens of an encoder: two-stage Deformable DETR (2010.04159, appendix A.4).

Notation: ``N`` tokens of all levels.
"""

import math
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from ...layers.blocks import apply_in_float32
from ...layers.deformable_attention import TokenPyramid
from ...layers.relation_attention import encode_by_waves
from ...structures import Predictions, Proposals, Targets, box_cxcywh_to_xyxy
from ..decoder.deformable import box_network, initialize_predictions, move_boxes
from ..losses.criterion import LossNormalizers, SetCriterion
from ..matching.costs import CostSettings
from ..matching.hungarian import HungarianMatcher
from .build import EXCLUDED_LOGIT, PROPOSALS_REGISTRY, ProposalSource

_SIDE = 0.05  # of the boxes of the finest level, as a fraction of the image; doubled by level
_MARGIN = 0.01  # least distance of a token from the border of the image, as a fraction of it


@PROPOSALS_REGISTRY.register()
class EncoderQueries(ProposalSource):
    """`P` queries at the tokens with the best scores.

    Every token predicts whether it belongs to an object, and a box. The boxes of the best ones are
    those of the queries, and their encoding gives position and content. All tokens have losses.
    """

    gives_queries = True

    @configurable
    def __init__(
        self,
        *,
        num_proposals: int,
        channels: int,
        prior_probability: float,
        matcher: HungarianMatcher,
        criterion: SetCriterion,
    ) -> None:
        """Build the layers for ``P`` queries of ``D`` channels.

        Args:
            num_proposals: ``P``; an image of fewer tokens has as many queries as tokens.
            channels: ``D``.
            prior_probability: score of an untrained model.
            matcher: of all tokens.
            criterion: losses of all tokens, of one class.
        """
        super().__init__()
        self.num_proposals = num_proposals
        self.matcher, self.criterion = matcher, criterion
        self.enc_output = nn.Linear(channels, channels)
        self.enc_output_norm = nn.LayerNorm(channels)
        self.pos_trans = nn.Linear(2 * channels, 2 * channels)
        self.pos_trans_norm = nn.LayerNorm(2 * channels)
        self.class_embed = nn.Linear(channels, 1)
        self.bbox_embed = box_network(channels)
        for layer in (self.enc_output, self.pos_trans):
            nn.init.xavier_uniform_(layer.weight)
        initialize_predictions(self.class_embed, self.bbox_embed, prior_probability)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read `MODEL.SparseRCNN`."""
        node = cfg.MODEL.SparseRCNN
        costs = CostSettings.from_config(cfg)._replace(l1_of_centers=True, focal=True)
        one_class: dict[str, Any] = {"num_classes": 1, "num_stages": 1, "deep_supervision": True}
        one_class |= {"focal": True, "normalizer": "gt", "log": None}
        return {
            "num_proposals": node.NUM_PROPOSALS,
            "channels": node.HIDDEN_DIM,
            "prior_probability": node.PRIOR_PROB,
            "matcher": HungarianMatcher(costs=costs),
            "criterion": SetCriterion(cfg, l1_of_centers=True, **one_class),
        }

    def forward(self, features: TokenPyramid, sizes: Tensor) -> tuple[Proposals, Predictions]:
        """Select queries in images of `sizes` (B, 4), ``w, h, w, h``.

        Returns:
            Boxes (B, P, 4) xyxy in pixels, without gradient, and features (B, P, 2 * D); and
            predictions (1, B, N, .) of all tokens for `losses`, masked where they are excluded.
        """
        is_excluded = (features.is_padding | self._is_at_border(features.places)).unsqueeze(-1)
        tokens = features.tokens.masked_fill(is_excluded, 0.0)
        tokens = self.enc_output_norm(self.enc_output(tokens))
        logits = apply_in_float32(self.class_embed, tokens)
        logits = logits.masked_fill(is_excluded, EXCLUDED_LOGIT)
        scale = sizes.unsqueeze(1)
        with torch.autocast(tokens.device.type, enabled=False):
            moved = move_boxes(self.bbox_embed, tokens, self._anchors(features))
            boxes = box_cxcywh_to_xyxy(moved) * scale
        count = min(self.num_proposals, boxes.shape[1])
        best = logits.squeeze(-1).topk(count, dim=1).indices.unsqueeze(-1)
        selected = moved.detach().gather(1, best.expand(-1, -1, 4))
        waves = encode_by_waves(selected * (2 * math.pi), tokens.shape[-1] // 2)
        queries = self.pos_trans_norm(self.pos_trans(waves.to(self.pos_trans.weight.dtype)))
        proposals = Proposals(box_cxcywh_to_xyxy(selected) * scale, queries)
        stage = torch.zeros(1, dtype=torch.int64, device=boxes.device)
        mask = ~is_excluded.squeeze(-1)
        return proposals, Predictions(logits.unsqueeze(0), boxes.unsqueeze(0), stage, mask)

    def losses(
        self, candidates: Predictions, targets: Targets, normalizers: LossNormalizers | None
    ) -> dict[str, Tensor]:
        """Compute the losses of all tokens, of one class, with the suffix ``_enc``."""
        targets = targets._replace(labels=torch.zeros_like(targets.labels))
        assignment = self.matcher(candidates, targets)
        losses = self.criterion(candidates, targets, assignment, normalizers)
        return {f"{name}_enc": value for name, value in losses.items()}

    def loss_normalizers(self, targets: list[Targets]) -> LossNormalizers:
        """Count the ground truths of all parts."""
        return self.criterion.normalizers([self.criterion.count(part) for part in targets])

    def _is_at_border(self, places: Tensor) -> Tensor:
        return ((places < _MARGIN) | (places > 1 - _MARGIN)).any(dim=-1)

    def _anchors(self, pyramid: TokenPyramid) -> Tensor:
        """Squares at the tokens, (B, N, 4) center and size as fractions of the image."""
        sides = [
            pyramid.places.new_full((height * width, 2), _SIDE * 2**level)
            for level, (height, width) in enumerate(pyramid.shapes)
        ]
        size = torch.cat(sides).expand(*pyramid.places.shape)
        dtype = torch.promote_types(torch.float32, pyramid.tokens.dtype)
        return torch.cat([pyramid.places, size], dim=-1).to(dtype)
