"""AdaMixer's decoder (arXiv 2203.16507): stages that sample the pyramid at points of their choice.

Notation: ``G`` groups of proposals.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from ...layers.adaptive_mixing import AdaptiveMixing
from ...layers.blocks import activation_from_name, initialize_xavier, linear_norm_act, prior_bias
from ...layers.point_sampling import GroupedPyramid, sample_points
from ...layers.relation_attention import RelationAttention
from ...structures import BOX_WEIGHTS, at_least_float32, boxes_to_xyzr, xyzr_to_boxes
from .cascade import Cascade
from .rcnn_head import Stage, StageSettings, stride_of

_GROUPS = 4  # channel groups for sampling and mixing
# Config keys without effect, and their defaults: boxes move by xyzr.
UNUSED_KEYS = {"MODEL.SparseRCNN.BOX_WEIGHTS": BOX_WEIGHTS}


class PositionalStage(Stage):
    """Position-aware attention, feed-forward network, class and box.

    Base of AdaMixer's stages and ASAG's query initializer, which call its parts. Positions are
    xyzr, `boxes_to_xyzr`.
    """

    def __init__(
        self, settings: StageSettings, *, tower_bias: bool, unit: float, ratio_scale: float
    ) -> None:
        """Build the layers.

        Args:
            settings: sizes.
            tower_bias: whether the linear layers of the towers have a bias.
            unit: pixels per unit of position.
            ratio_scale: factor of the aspect ratio's logarithm.
        """
        super().__init__()
        self.unit, self.ratio_scale = unit, ratio_scale
        channels, hidden = settings.channels, settings.feedforward_channels
        options: dict[str, Any] = {"bias": tower_bias, "activation": settings.activation}
        self.attention = RelationAttention(channels, settings.attention_heads)
        self.linear1 = nn.Linear(channels, hidden)
        self.linear2 = nn.Linear(hidden, channels)
        self.activation = activation_from_name(settings.activation)
        self.ffn_norm = nn.LayerNorm(channels)
        self.cls_fcs = linear_norm_act(channels, settings.num_cls, **options)
        self.reg_fcs = linear_norm_act(channels, settings.num_reg, **options)
        self.fc_cls = nn.Linear(channels, settings.num_logits)
        self.fc_reg = nn.Linear(channels, 4)

    @torch.no_grad()
    def initialize(self, prior_probability: float | None) -> None:
        """Initialize by Xavier; boxes start unchanged, classes at the prior if there is one."""
        initialize_xavier(self)
        self.attention.initialize()
        nn.init.zeros_(self.fc_reg.weight)
        nn.init.zeros_(self.fc_reg.bias)
        if prior_probability is not None:
            nn.init.constant_(self.fc_cls.bias, prior_bias(prior_probability))

    def positions(self, boxes: Tensor) -> Tensor:
        """Compute xyzr of boxes (..., 4), never in half precision."""
        with torch.autocast(boxes.device.type, enabled=False):
            return boxes_to_xyzr(boxes, unit=self.unit, ratio_scale=self.ratio_scale)

    def feed_forward_and_move(self, features: Tensor, xyzr: Tensor) -> tuple[Tensor, Tensor]:
        """Return boxes (..., 4) and features (..., D) of the next stage.

        Centers move in units of the scale ``2^z``; deltas of z and r are added.
        """
        hidden = self.linear2(self.activation(self.linear1(features)))
        features = self.ffn_norm(features + hidden)
        tower = self.reg_fcs(features)
        with torch.autocast(tower.device.type, enabled=False):
            deltas = self.fc_reg(tower.to(self.fc_reg.weight.dtype)).to(xyzr.dtype)
            moved = xyzr[..., :2] + deltas[..., :2] * torch.exp2(xyzr[..., 2:3])
            refined = torch.cat([moved, xyzr[..., 2:] + deltas[..., 2:]], dim=-1)
            boxes = xyzr_to_boxes(refined, unit=self.unit, ratio_scale=self.ratio_scale)
        return boxes, features

    def classify(self, features: Tensor) -> Tensor:
        """Return logits (..., C) of features (..., D) of the next stage."""
        logits: Tensor = self.fc_cls(self.cls_fcs(features))
        return logits


class AdaMixerStage(PositionalStage):
    """Position-aware attention, sampling in space and scale, adaptive mixing (section 3)."""

    @configurable
    def __init__(
        self,
        *,
        settings: StageSettings,
        in_points: int,
        out_points: int,
        groups: int = _GROUPS,
        tower_bias: bool = True,
        unit: float = 1.0,
        ratio_scale: float = 1.0,
        grid: bool = True,
    ) -> None:
        """Build one stage; see `PositionalStage` for other arguments.

        Per channel group `in_points` are sampled and mixed to `out_points`. With `grid` they start
        on a grid in the box if their number is a square, else at random.
        """
        super().__init__(settings, tower_bias=tower_bias, unit=unit, ratio_scale=ratio_scale)
        channels = settings.channels
        self.groups, self.in_points, self.grid = groups, in_points, grid
        self.sampling_offset_generator = nn.Linear(channels, groups * in_points * 3)
        activation = activation_from_name(settings.activation)
        self.adaptive_mixing = AdaptiveMixing(channels, groups, in_points, out_points, activation)
        self.mixing_norm = nn.LayerNorm(channels)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read `MODEL.SparseRCNN` and `MODEL.AdaMixer`; towers have one layer, as published."""
        settings = replace(StageSettings.from_config(cfg), num_cls=1, num_reg=1)
        node = cfg.MODEL.AdaMixer
        return {"settings": settings, "in_points": node.IN_POINTS, "out_points": node.OUT_POINTS}

    @torch.no_grad()
    def initialize(self, prior_probability: float | None) -> None:
        """Spread the points over the box, one level finer; boxes and mixing start unchanged."""
        super().initialize(prior_probability)
        self.adaptive_mixing.initialize()
        nn.init.zeros_(self.sampling_offset_generator.weight)
        offsets = self.sampling_offset_generator.bias.view(self.groups, self.in_points, 3)
        side = math.isqrt(self.in_points)
        if self.grid and side**2 == self.in_points:
            steps = (torch.arange(side) + 0.5) / side - 0.5  # centers of side x side cells
            offsets[..., :2] = torch.cartesian_prod(steps, steps)
        else:
            offsets[..., :2].uniform_(-0.5, 0.5)
        offsets[..., 2] = -1.0

    def forward(
        self,
        pyramid: GroupedPyramid,
        boxes: Tensor,
        features: Tensor,
        mask: Tensor | None = None,
        *,
        classify: bool = True,
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Refine every proposal once.

        Args:
            pyramid: of the images, with this stage's channel groups.
            boxes: (B, G, P, 4) xyxy in pixels.
            features: (B, G, P, D).
            mask: (B, P) or (B, P, P) bool, False for keys to ignore; with one group.
            classify: False leaves the logits out.

        Returns:
            Logits (B, G, P, C) or None, boxes (B, G, P, 4) and features (B, G, P, D).
        """
        xyzr = self.positions(boxes)
        flat = (x.flatten(0, 1) for x in (features, xyzr, boxes))
        features = self.attention(*flat, mask).view_as(features)  # residual and norm included
        boxes, features = self.feed_forward_and_move(self._mix(pyramid, xyzr, features), xyzr)
        return self.classify(features) if classify else None, boxes, features

    def _mix(self, pyramid: GroupedPyramid, xyzr: Tensor, features: Tensor) -> Tensor:
        """Sample around the boxes and mix the samples into the features."""
        offsets = self.sampling_offset_generator(features)
        points = self.points(xyzr, offsets).flatten(1, 2)  # groups of proposals share the image
        sampled = sample_points(pyramid, points)
        rows = features.flatten(0, 2)
        mixed = self.adaptive_mixing(sampled.flatten(0, 1).to(rows.dtype), rows)  # with residual
        normed: Tensor = self.mixing_norm(mixed)
        return normed.view_as(features)

    def points(self, xyzr: Tensor, offsets: Tensor) -> Tensor:
        """Compute sampling points (..., groups, points, 3) in pixels and log2 of the scale.

        Positions `xyzr` are (..., 4), `offsets` (..., groups * points * 3) in widths and heights of
        the box and in scales.
        """
        offsets = offsets.to(xyzr.dtype).unflatten(-1, (self.groups, self.in_points, 3))
        box = xyzr_to_boxes(xyzr, ratio_scale=self.ratio_scale)
        size = (box[..., 2:] - box[..., :2]).unsqueeze(-2).unsqueeze(-2)
        center = xyzr[..., :2].unsqueeze(-2).unsqueeze(-2)
        place = (center + offsets[..., :2] * size) * self.unit
        scale = xyzr[..., None, None, 2:3] + offsets[..., 2:]
        return torch.cat([place, scale + math.log2(self.unit)], dim=-1)


class AdaMixerDecoder(Cascade):
    """Cascade whose stages sample every level of the pyramid."""

    @configurable
    def __init__(self, *, stage: AdaMixerStage, strides: tuple[int, ...], **kwargs: Any) -> None:
        """Add the strides of the levels, finest first; other arguments are `Cascade`'s."""
        super().__init__(stage=stage, **kwargs)
        self.strides = strides
        self.groups = stage.groups

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read `MODEL.SparseRCNN` and `MODEL.AdaMixer`."""
        strides = tuple(stride_of(name) for name in cfg.MODEL.ROI_HEADS.IN_FEATURES)
        return {**super().from_config(cfg), "stage": AdaMixerStage(cfg), "strides": strides}

    def prepare(self, features: list[Tensor]) -> GroupedPyramid:
        """Split the channels of all levels into groups, in float32."""
        with torch.autocast(features[0].device.type, enabled=False):
            levels = [at_least_float32(x) for x in features]
            return GroupedPyramid.from_levels(levels, self.strides, self.groups)

    def run_stage(
        self,
        stage: nn.Module,
        pyramid: GroupedPyramid,
        boxes: Tensor,
        states: Tensor,
        *,
        classify: bool,
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Refine the proposals by sampling the pyramid."""
        return stage(pyramid, boxes, states, classify=classify)
