"""The decoder of AdaMixer (arXiv 2203.16507): a cascade whose stages sample the pyramid freely."""

import math
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from ...layers.adaptive_mixing import AdaptiveMixing
from ...layers.blocks import activation_from_name, initialize_xavier, linear_norm_act, prior_bias
from ...layers.point_sampling import GroupedPyramid, sample_points
from ...layers.relation_attention import RelationAttention
from ...structures import at_least_float32, boxes_to_xyzr, xyzr_to_boxes
from .cascade import Cascade
from .rcnn_head import stride_of

__all__ = ["AdaMixerDecoder", "AdaMixerStage", "PositionalStage"]


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


class AdaMixerStage(PositionalStage):
    """Attention that knows positions, sampling in space and scale, mixing, class and box."""

    @configurable
    def __init__(
        self,
        *,
        channels: int,
        num_logits: int,
        attention_heads: int,
        feedforward_channels: int,
        groups: int = 4,
        in_points: int = 32,
        out_points: int = 128,
        num_cls: int = 1,
        num_reg: int = 1,
        tower_bias: bool = True,
        activation: str = "relu",
        unit: float = 1.0,
        ratio_scale: float = 1.0,
        grid: bool = True,
    ) -> None:
        """Make one stage.

        Args:
            channels: ``D``.
            num_logits: outputs of the classifier.
            attention_heads: heads of the attention.
            feedforward_channels: inner width of the feed-forward network.
            groups: parts that channels are cut into for sampling and mixing.
            in_points: sampled per group.
            out_points: per group after the mixing.
            num_cls: layers of the classification tower.
            num_reg: layers of the box tower.
            tower_bias: whether their linear layers have one.
            activation: "relu" or "gelu".
            unit: pixels in which positions are told, see `boxes_to_xyzr`.
            ratio_scale: likewise.
            grid: points start on a grid in the box if their number is a square; else scattered.
        """
        super().__init__(
            channels=channels,
            num_logits=num_logits,
            attention_heads=attention_heads,
            feedforward_channels=feedforward_channels,
            num_cls=num_cls,
            num_reg=num_reg,
            tower_bias=tower_bias,
            activation=activation,
            unit=unit,
            ratio_scale=ratio_scale,
        )
        self.groups, self.in_points, self.grid = groups, in_points, grid
        self.sampling_offset_generator = nn.Linear(channels, groups * in_points * 3)
        act = activation_from_name(activation)
        self.adaptive_mixing = AdaptiveMixing(channels, groups, in_points, out_points, act)
        self.mixing_norm = nn.LayerNorm(channels)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        """Read `MODEL.SparseRCNN`, what all cascades share, and `MODEL.AdaMixer`."""
        node, own = cfg.MODEL.SparseRCNN, cfg.MODEL.AdaMixer
        return {
            "channels": node.HIDDEN_DIM,
            "num_logits": node.NUM_CLASSES + (0 if node.USE_FOCAL else 1),
            "attention_heads": node.NHEADS,
            "feedforward_channels": node.DIM_FEEDFORWARD,
            "activation": node.ACTIVATION,
            "groups": own.GROUPS,
            "in_points": own.IN_POINTS,
            "out_points": own.OUT_POINTS,
            "num_cls": own.NUM_CLS,
            "num_reg": own.NUM_REG,
        }

    @torch.no_grad()
    def initialize(self, prior_probability: float | None) -> None:
        """Xavier; points spread over the box, one level finer; boxes and mixing at rest."""
        super().initialize(prior_probability)
        self.adaptive_mixing.initialize()
        nn.init.zeros_(self.sampling_offset_generator.weight)
        offsets = self.sampling_offset_generator.bias.view(self.groups, self.in_points, 3)
        side = math.isqrt(self.in_points)
        if self.grid and side**2 == self.in_points:
            steps = (torch.arange(side) + 0.5) / side - 0.5  # the middles of side x side cells
            offsets[..., :2] = torch.cartesian_prod(steps, steps)
        else:
            offsets[..., :2].uniform_(-0.5, 0.5)
        offsets[..., 2] = -1.0

    def forward(
        self, pyramid: GroupedPyramid, boxes: Tensor, features: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Refine every proposal once.

        Args:
            pyramid: of the images, with this stage's groups of channels.
            boxes: (B, G, P, 4) xyxy in pixels.
            features: (B, G, P, D).
            mask: (B, P) or (B, P, P) bool, False for what must not be attended to; with one group.

        Returns:
            Logits (B, G, P, C), boxes (B, G, P, 4) and features (B, G, P, D).
        """
        xyzr = self._positions(boxes)
        flat = (x.flatten(0, 1) for x in (features, xyzr, boxes))
        features = self.attention(*flat, mask).view_as(features)
        return self._conclude(self._mix(pyramid, xyzr, features), xyzr)

    def _mix(self, pyramid: GroupedPyramid, xyzr: Tensor, features: Tensor) -> Tensor:
        """Sample around the boxes and mix what is there into the features."""
        offsets = self.sampling_offset_generator(features)
        points = self.points(xyzr, offsets).flatten(1, 2)  # groups of proposals share the image
        sampled = sample_points(pyramid, points)
        rows = features.flatten(0, 2)
        mixed = self.adaptive_mixing(sampled.flatten(0, 1).to(rows.dtype), rows)
        normed: Tensor = self.mixing_norm(mixed)
        return normed.view_as(features)

    def points(self, xyzr: Tensor, offsets: Tensor) -> Tensor:
        """Where to sample: (..., 4) and (..., groups * points * 3) to (..., groups, points, 3).

        Offsets are in widths and heights of the box, and in scales. Points are in pixels.
        """
        offsets = offsets.to(xyzr.dtype).unflatten(-1, (self.groups, self.in_points, 3))
        box = xyzr_to_boxes(xyzr, ratio_scale=self.ratio_scale)
        size = (box[..., 2:] - box[..., :2]).unsqueeze(-2).unsqueeze(-2)
        centre = xyzr[..., :2].unsqueeze(-2).unsqueeze(-2)
        place = (centre + offsets[..., :2] * size) * self.unit
        scale = xyzr[..., None, None, 2:3] + offsets[..., 2:]
        return torch.cat([place, scale + math.log2(self.unit)], dim=-1)


class AdaMixerDecoder(Cascade):
    """Stages read every level of the pyramid at points that the proposals choose."""

    @configurable
    def __init__(self, *, stage: AdaMixerStage, strides: tuple[int, ...], **kwargs: Any) -> None:
        """Set the pyramid.

        Args:
            stage: the stage to copy.
            strides: of the levels, finest first.
            **kwargs: of `Cascade`.
        """
        super().__init__(stage=stage, **kwargs)
        self.strides = strides
        self.groups = stage.groups

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        """Read `MODEL.SparseRCNN` and `MODEL.AdaMixer`."""
        strides = tuple(stride_of(name) for name in cfg.MODEL.ROI_HEADS.IN_FEATURES)
        return {**super().from_config(cfg), "stage": AdaMixerStage(cfg), "strides": strides}

    def prepare(self, features: list[Tensor]) -> GroupedPyramid:
        """Cut the channels of all levels into groups, in float32."""
        with torch.autocast(features[0].device.type, enabled=False):
            levels = [at_least_float32(x) for x in features]
            return GroupedPyramid.from_levels(levels, self.strides, self.groups)

    def _run_stage(
        self, stage: nn.Module, pyramid: GroupedPyramid, boxes: Tensor, states: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return stage(pyramid, boxes, states)
