"""From anchors to proposals: what is at an anchor, how anchors lie to each other, a first guess.

ASAG, arXiv 2308.09242, section 3.3. Letters: ``B`` images, ``N`` anchors, ``D`` channels, ``C``
classes.
"""

from typing import NamedTuple

import torch
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from torch import Tensor, nn

from ...layers.blocks import activation_from_name, initialize_xavier, linear_norm_act, prior_bias
from ...layers.relation_attention import RelationAttention
from ...structures import boxes_to_xyzr, xyzr_to_boxes

__all__ = ["InitialQueries", "QueryInitializer", "UnalignedRoIs", "attention_mask"]


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


class UnalignedRoIs(nn.Module):
    """RoI features as ASAG's published weights know them: without the half pixel's shift."""

    def __init__(self, strides: tuple[int, ...], resolution: int = 7, samples: int = 2) -> None:
        """Set the grid for levels of these strides, finest first."""
        super().__init__()
        scales = tuple(1.0 / stride for stride in strides)
        self.pooler = ROIPooler(resolution, scales, samples, "ROIAlign")

    def forward(self, features: list[Tensor], boxes: Tensor) -> Tensor:
        """Pool boxes (B, N, 4) xyxy into (B * N, D, R, R); no gradient reaches the boxes."""
        rois: Tensor = self.pooler(features, [Boxes(b) for b in boxes.detach().float()])
        return rois


class QueryInitializer(nn.Module):
    """RoI features, attention that knows positions, a feed-forward net, class and box."""

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
    ) -> None:
        """Make it.

        Args:
            channels: ``D``.
            num_classes: ``C``.
            attention_heads: of the attention.
            feedforward_channels: inner width of the feed-forward net.
            roi_positions: cells of a RoI.
            num_cls: layers of the classification tower.
            num_reg: layers of the box tower.
            activation: "gelu" or "relu".
        """
        super().__init__()
        self.roi = nn.Linear(channels * roi_positions, channels)
        self.roi_norm = nn.LayerNorm(channels)
        self.attention = RelationAttention(channels, attention_heads)
        self.linear1 = nn.Linear(channels, feedforward_channels)
        self.linear2 = nn.Linear(feedforward_channels, channels)
        self.activation = activation_from_name(activation)
        self.ffn_norm = nn.LayerNorm(channels)
        self.cls_fcs = linear_norm_act(channels, num_cls, activation=activation)
        self.reg_fcs = linear_norm_act(channels, num_reg, activation=activation)
        self.fc_cls = nn.Linear(channels, num_classes)
        self.fc_reg = nn.Linear(channels, 4)
        self.initialize(0.01)

    @torch.no_grad()
    def initialize(self, prior_probability: float) -> None:
        """Xavier; boxes stay, classes start at the prior."""
        initialize_xavier(self)
        self.attention.initialize()
        nn.init.zeros_(self.fc_reg.weight)
        nn.init.zeros_(self.fc_reg.bias)
        nn.init.constant_(self.fc_cls.bias, prior_bias(prior_probability))

    def forward(self, rois: Tensor, boxes: Tensor, mask: Tensor | None = None) -> InitialQueries:
        """Look at anchors.

        Args:
            rois: (B * N, D, R, R) features at the anchors.
            boxes: (B, N, 4) xyxy in pixels.
            mask: see `attention_mask`.

        Returns:
            A first guess, and features; gradients reach both.
        """
        features = self.roi_norm(self.roi(rois.flatten(1))).view(*boxes.shape[:2], -1)
        xyzr = boxes_to_xyzr(boxes, unit=4.0, ratio_scale=0.5)
        features = self.attention(features, xyzr, boxes, mask)
        features = self.ffn_norm(features + self.linear2(self.activation(self.linear1(features))))
        logits = self.fc_cls(self.cls_fcs(features))
        deltas = self.fc_reg(self.reg_fcs(features)).to(xyzr.dtype)
        moved = xyzr[..., :2] + deltas[..., :2] * torch.exp2(xyzr[..., 2:3])
        refined = torch.cat([moved, xyzr[..., 2:] + deltas[..., 2:]], dim=-1)
        return InitialQueries(logits, xyzr_to_boxes(refined, unit=4.0, ratio_scale=0.5), features)
