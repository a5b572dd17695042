"""What AdaMixer's stages and ASAG's query initializer share.

Letters: any leading shape ``...``, ``D`` channels, ``C`` classes.
"""

import torch
from torch import Tensor, nn

from ...layers.blocks import activation_from_name, initialize_xavier, linear_norm_act, prior_bias
from ...layers.relation_attention import RelationAttention
from ...structures import boxes_to_xyzr, xyzr_to_boxes

__all__ = ["PositionalStage"]


class PositionalStage(nn.Module):
    """Attention that knows positions first; feed-forward net, class and box last."""

    def __init__(
        self,
        *,
        channels: int,
        num_logits: int,
        attention_heads: int,
        feedforward_channels: int,
        num_cls: int,
        num_reg: int,
        tower_bias: bool,
        activation: str,
        unit: float,
        ratio_scale: float,
    ) -> None:
        """Make the parts.

        Args:
            channels: ``D``.
            num_logits: outputs of the classifier.
            attention_heads: heads of the attention.
            feedforward_channels: inner width of the feed-forward network.
            num_cls: layers of the classification tower.
            num_reg: layers of the box tower.
            tower_bias: whether their linear layers have one.
            activation: "relu" or "gelu".
            unit: pixels in which positions are told, see `boxes_to_xyzr`.
            ratio_scale: likewise.
        """
        super().__init__()
        self.unit, self.ratio_scale = unit, ratio_scale
        self.attention = RelationAttention(channels, attention_heads)
        self.linear1 = nn.Linear(channels, feedforward_channels)
        self.linear2 = nn.Linear(feedforward_channels, channels)
        self.activation = activation_from_name(activation)
        self.ffn_norm = nn.LayerNorm(channels)
        self.cls_fcs = linear_norm_act(channels, num_cls, bias=tower_bias, activation=activation)
        self.reg_fcs = linear_norm_act(channels, num_reg, bias=tower_bias, activation=activation)
        self.fc_cls = nn.Linear(channels, num_logits)
        self.fc_reg = nn.Linear(channels, 4)

    @torch.no_grad()
    def initialize(self, prior_probability: float | None) -> None:
        """Xavier; boxes stay, classes start at the prior, if there is one."""
        initialize_xavier(self)
        self.attention.initialize()
        nn.init.zeros_(self.fc_reg.weight)
        nn.init.zeros_(self.fc_reg.bias)
        if prior_probability is not None:
            nn.init.constant_(self.fc_cls.bias, prior_bias(prior_probability))

    def _positions(self, boxes: Tensor) -> Tensor:
        """Xyzr of boxes (..., 4), never in half precision."""
        with torch.autocast(boxes.device.type, enabled=False):
            return boxes_to_xyzr(boxes, unit=self.unit, ratio_scale=self.ratio_scale)

    def _conclude(self, features: Tensor, xyzr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (..., C), boxes (..., 4) and features (..., D), from features and positions."""
        hidden = self.linear2(self.activation(self.linear1(features)))
        features = self.ffn_norm(features + hidden)
        tower = self.reg_fcs(features)
        with torch.autocast(tower.device.type, enabled=False):
            deltas = self.fc_reg(tower.to(self.fc_reg.weight.dtype)).to(xyzr.dtype)
            moved = xyzr[..., :2] + deltas[..., :2] * torch.exp2(xyzr[..., 2:3])
            refined = torch.cat([moved, xyzr[..., 2:] + deltas[..., 2:]], dim=-1)
            boxes = xyzr_to_boxes(refined, unit=self.unit, ratio_scale=self.ratio_scale)
        return self.fc_cls(self.cls_fcs(features)), boxes, features
