"""Decoders of one layer, side by side: all are trained, one is used (ASAG section 3.4).

Letters: ``B`` images, ``N`` queries, ``D`` channels, ``C`` classes, ``K`` decoders.
"""

import copy

import torch
from torch import Tensor, nn

from ...layers.point_sampling import GroupedPyramid
from ...layers.roi_align import FeatureTable
from ...structures import Predictions
from ..decoder import AdaMixerStage, RCNNHead, RoIFeatures
from .query_initializer import InitialQueries

__all__ = ["ParallelDecoders"]


class ParallelDecoders(nn.Module):
    """`K` stages that all refine the same queries; a learned vector tells each who it is."""

    def __init__(
        self,
        stage: AdaMixerStage | RCNNHead,
        *,
        channels: int,
        strides: tuple[int, ...],
        rois: RoIFeatures,
        count: int = 4,
        used: int = -1,
        prior_probability: float = 0.01,
    ) -> None:
        """Make `count` copies.

        Args:
            stage: to copy, of AdaMixer (ASAG-A) or Sparse R-CNN (ASAG-S).
            channels: ``D``.
            strides: of the pyramid, finest first.
            rois: what pools for Sparse R-CNN's stage.
            count: ``K``.
            used: which of them inference uses.
            prior_probability: class score of an untrained model.
        """
        super().__init__()
        self.stages = nn.ModuleList(copy.deepcopy(stage) for _ in range(count))
        self.decoder_embedding = nn.Embedding(count, channels)
        self.strides = strides
        self.rois = rois
        self.used = used % count
        for member in self.stages:
            assert isinstance(member, AdaMixerStage | RCNNHead)  # a copy of `stage`
            member.initialize(prior_probability)
            if isinstance(member, RCNNHead):  # boxes start where the query initializer put them
                nn.init.zeros_(member.bboxes_delta.weight)
                nn.init.zeros_(member.bboxes_delta.bias)

    def forward(
        self,
        features: list[Tensor],
        table: FeatureTable,
        queries: InitialQueries,
        mask: Tensor | None = None,
    ) -> Predictions:
        """Refine the queries once.

        Args:
            features: pyramid levels (B, D, H_l, W_l), finest first.
            table: the same, as `rois` prepares them.
            queries: boxes are used without gradient, features with it.
            mask: (B, N) or (B, N, N) bool, False for what must not be attended to.

        Returns:
            In training a prediction set of every decoder, numbered like stages; otherwise that of
            the used one alone.
        """
        order = list(range(len(self.stages))) if self.training else [self.used]
        boxes = queries.boxes.detach().unsqueeze(1)
        read = self._reader(features, table, queries.boxes)
        found = []
        for index in order:
            states = (queries.features + self.decoder_embedding.weight[index]).unsqueeze(1)
            found.append(self.stages[index](read, boxes, states, mask)[:2])
        logits, refined = (torch.cat(x, dim=1).transpose(0, 1) for x in zip(*found, strict=True))
        return Predictions(logits, refined, torch.tensor(order, device=boxes.device))

    def _reader(
        self, features: list[Tensor], table: FeatureTable, boxes: Tensor
    ) -> GroupedPyramid | Tensor:
        """What a stage reads: the pyramid, or RoI features (B * N, R * R, D)."""
        first = self.stages[0]
        if isinstance(first, AdaMixerStage):
            return GroupedPyramid.from_levels(features, self.strides, first.groups)
        rois: Tensor = self.rois(table, boxes)
        return rois
