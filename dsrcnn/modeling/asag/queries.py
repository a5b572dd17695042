"""From anchors to proposals: what is at an anchor, how anchors lie to each other, a first guess.

ASAG, arXiv 2308.09242, section 3.3. Letters: ``B`` images, ``N`` anchors, ``D`` channels, ``C``
classes.
"""

import copy
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from ...layers.point_sampling import GroupedPyramid
from ...layers.roi_align import FeatureTable
from ...structures import Predictions
from ..decoder import AdaMixerStage, PositionalStage, RCNNHead, RoIFeatures
from .patches import Objects

__all__ = [
    "InitialQueries",
    "NoisyQueries",
    "ParallelDecoders",
    "QueryInitializer",
    "attention_mask",
    "denoising_mask",
    "noisy_queries",
]


def attention_mask(valid: Tensor) -> Tensor:
    """Who may attend to whom (B, N, N): queries (B, N) to valid ones, padding to everything."""
    return valid.unsqueeze(1) | ~valid.unsqueeze(2)


class InitialQueries(NamedTuple):
    """What the decoders start from.

    Attributes:
        logits: (B, N, C) of a first guess.
        boxes: (B, N, 4) xyxy in pixels, of the same.
        features: (B, N, D).
    """

    logits: Tensor
    boxes: Tensor
    features: Tensor


class QueryInitializer(PositionalStage):
    """RoI features, attention that knows positions, a feed-forward net, class and box."""

    @configurable
    def __init__(
        self,
        *,
        channels: int = 256,
        num_classes: int = 80,
        attention_heads: int = 8,
        feedforward_channels: int = 2048,
        roi_positions: int = 49,
        num_cls: int = 1,
        num_reg: int = 3,
        activation: str = "gelu",
        prior_probability: float = 0.01,
    ) -> None:
        """Make it; see `PositionalStage`.

        Args:
            channels: ``D``.
            num_classes: ``C``.
            attention_heads: of the attention.
            feedforward_channels: inner width of the feed-forward net.
            roi_positions: cells of a RoI.
            num_cls: layers of the classification tower.
            num_reg: layers of the box tower.
            activation: "gelu" or "relu".
            prior_probability: class score of an untrained model.
        """
        super().__init__(
            channels=channels,
            num_logits=num_classes,
            attention_heads=attention_heads,
            feedforward_channels=feedforward_channels,
            num_cls=num_cls,
            num_reg=num_reg,
            tower_bias=False,
            activation=activation,
            unit=4.0,
            ratio_scale=0.5,
        )
        self.roi = nn.Linear(channels * roi_positions, channels)
        self.roi_norm = nn.LayerNorm(channels)
        self.initialize(prior_probability)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read `MODEL.SparseRCNN` and the pooler's resolution."""
        node = cfg.MODEL.SparseRCNN
        return {
            "channels": node.HIDDEN_DIM,
            "num_classes": node.NUM_CLASSES,
            "attention_heads": node.NHEADS,
            "feedforward_channels": node.DIM_FEEDFORWARD,
            "roi_positions": cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION**2,
            "num_cls": node.NUM_CLS,
            "num_reg": node.NUM_REG,
            "activation": node.ACTIVATION,
            "prior_probability": node.PRIOR_PROB,
        }

    def forward(self, rois: Tensor, boxes: Tensor, mask: Tensor | None = None) -> InitialQueries:
        """Look at anchors.

        Args:
            rois: (B * N, R * R, D) features at the anchors.
            boxes: (B, N, 4) xyxy in pixels.
            mask: see `attention_mask`.

        Returns:
            A first guess, and features; gradients reach both.
        """
        features = self.roi_norm(self.roi(rois.transpose(1, 2).flatten(1))).view(
            *boxes.shape[:2], -1
        )
        xyzr = self._positions(boxes)
        features = self.attention(features, xyzr, boxes, mask)
        return InitialQueries(*self._conclude(features, xyzr))


class NoisyQueries(NamedTuple):
    """Objects over and over, each time with other noise.

    Attributes:
        boxes: (B, n, 4) cxcywh as shares of the image; in the padding the whole image.
        assignment: (B, n) int64, index of the object, -1 in the padding.
        group: (B, n) int64, the repetition; padding is a group of its own, -1.
    """

    boxes: Tensor
    assignment: Tensor
    group: Tensor


def noisy_queries(objects: Objects, count: int, noise: float) -> NoisyQueries:
    """Repeat the objects of every image as often as `count` queries allow.

    Args:
        objects: (B, M), boxes as shares of the image.
        count: ``n``. An image without objects, or with more, has padding alone.
        noise: how far a centre may move, in halves of the box, and a side change, in sides.
    """
    images, device = len(objects.mask), objects.mask.device
    number = objects.mask.sum(dim=1, keepdim=True)
    slot = torch.arange(count, device=device).expand(images, -1)
    index, group = slot % number.clamp(min=1), slot // number.clamp(min=1)
    # Objects stand before their padding; a last, incomplete repetition is left out.
    real = (number > 0) & (group < count // number.clamp(min=1))
    whole = objects.boxes.new_tensor([0.5, 0.5, 1.0, 1.0])
    if not objects.mask.shape[1]:
        boxes = whole.expand(images, count, 4)
    else:
        clean = objects.boxes.take_along_dim(index.unsqueeze(-1), dim=1)
        reach = torch.cat([clean[..., 2:] / 2, clean[..., 2:]], dim=-1) * noise
        moved = (clean + (2 * torch.rand_like(clean) - 1) * reach).clamp(0, 1)
        boxes = torch.where(real.unsqueeze(-1), moved, whole)
    return NoisyQueries(boxes, index.masked_fill(~real, -1), group.masked_fill(~real, -1))


def denoising_mask(group: Tensor, valid: Tensor) -> Tensor:
    """Who may attend to whom: (B, n + N, n + N) bool.

    Denoising queries see their repetition and the valid anchors, anchors see each other alone.
    Padding among the anchors is seen by itself only.

    Args:
        group: (B, n), see `NoisyQueries`.
        valid: (B, N) bool, False for padding.
    """
    count, anchors = group.shape[1], valid.shape[1]
    same = group.unsqueeze(2) == group.unsqueeze(1)
    above = torch.cat([same, valid.unsqueeze(1).expand(-1, count, -1)], dim=2)
    itself = torch.eye(anchors, dtype=torch.bool, device=valid.device)
    among = valid.unsqueeze(1) | itself
    below = torch.cat([among.new_zeros(len(valid), anchors, count), among], dim=2)
    return torch.cat([above, below], dim=1)


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
