"""One stage of the cascade and its RoI features (Sparse R-CNN section 3.2).

Notation: ``G`` groups of proposals (1, or more with SQR), ``K`` positions of a RoI.
"""

from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from ...errors import ConfigError
from ...layers.blocks import activation_from_name, initialize_xavier, linear_norm_act, prior_bias
from ...layers.dynamic_conv import DynamicConv
from ...layers.norm import autocast_dtype
from ...layers.roi_align import FeatureTable, pool_rois
from ...structures import BOX_WEIGHTS, apply_deltas, at_least_float32


def stride_of(name: str) -> int:
    """Return the stride of a pyramid level by its name: ``p3`` has 8."""
    if not (name.startswith("p") and name[1:].isdigit()):
        raise ConfigError(
            f"MODEL.ROI_HEADS.IN_FEATURES names {name!r}; the cascade pools from pyramid levels. "
            "Write [p2, p3, p4, p5]."
        )
    return 2 ** int(name[1:])


class RoIFeatures(nn.Module):
    """Pool a fixed grid of features for every box; without parameters."""

    @configurable
    def __init__(
        self,
        *,
        strides: tuple[int, ...],
        resolution: int = 7,
        samples: int = 2,
        aligned: bool = True,
    ) -> None:
        """Set the grid.

        Args:
            strides: of the pyramid levels, finest first, each twice the one before.
            resolution: cells per side of a RoI.
            samples: sampling points per cell and side.
            aligned: see `pool_rois`.

        Raises:
            ConfigError: if `samples` is not positive.
        """
        super().__init__()
        if samples < 1:
            raise ConfigError(
                f"MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO is {samples}; write a number of at "
                "least 1 (Sparse R-CNN uses 2)."
            )
        self.strides, self.aligned = strides, aligned
        self.resolution, self.samples = resolution, samples

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read `MODEL.ROI_BOX_HEAD`; strides follow the names ``p2`` ... of the features."""
        node = cfg.MODEL.ROI_BOX_HEAD
        if node.POOLER_TYPE != "ROIAlignV2":
            raise ConfigError(
                f"MODEL.ROI_BOX_HEAD.POOLER_TYPE is {node.POOLER_TYPE!r}; the cascade pools with "
                "'ROIAlignV2' (aligned RoIAlign). Write MODEL.ROI_BOX_HEAD.POOLER_TYPE ROIAlignV2."
            )
        return {
            "strides": tuple(stride_of(name) for name in cfg.MODEL.ROI_HEADS.IN_FEATURES),
            "resolution": node.POOLER_RESOLUTION,
            "samples": node.POOLER_SAMPLING_RATIO,
        }

    def extra_repr(self) -> str:
        """Settings for the printed model."""
        return f"strides={self.strides}, resolution={self.resolution}, samples={self.samples}"

    def prepare(self, features: list[Tensor]) -> FeatureTable:
        """Lay out the pyramid levels (B, D, H_l, W_l) once for all stages, in float32."""
        with torch.autocast(features[0].device.type, enabled=False):
            return FeatureTable.from_levels([at_least_float32(f) for f in features], self.strides)

    def forward(self, table: FeatureTable, boxes: Tensor) -> Tensor:
        """Pool boxes (B, R, 4) into (B * R, K, D); no gradient reaches the boxes."""
        return pool_rois(
            table, boxes, cells=self.resolution, samples=self.samples, aligned=self.aligned
        )


@dataclass(frozen=True)
class StageSettings:
    """Sizes that the stages of all decoders share.

    Attributes:
        channels: ``D``.
        num_logits: outputs of the classifier: ``C``, or ``C + 1`` with softmax.
        attention_heads: heads of the self-attention.
        feedforward_channels: inner width of the feed-forward network.
        num_cls: layers of the classification tower.
        num_reg: layers of the box tower.
        activation: of the feed-forward network, "relu" or "gelu".
    """

    channels: int
    num_logits: int
    attention_heads: int
    feedforward_channels: int
    num_cls: int
    num_reg: int
    activation: str

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "StageSettings":
        """Read `MODEL.SparseRCNN`."""
        node = cfg.MODEL.SparseRCNN
        return cls(
            channels=node.HIDDEN_DIM,
            num_logits=node.NUM_CLASSES + (0 if node.USE_FOCAL else 1),
            attention_heads=node.NHEADS,
            feedforward_channels=node.DIM_FEEDFORWARD,
            num_cls=node.NUM_CLS,
            num_reg=node.NUM_REG,
            activation=node.ACTIVATION,
        )


class Stage(nn.Module):
    """Base of the stages of all decoders."""

    def initialize(self, prior_probability: float | None) -> None:
        """Initialize the parameters.

        Args:
            prior_probability: class score of an untrained model, None for softmax classification.
        """
        raise NotImplementedError


class RCNNHead(Stage):
    """Self-attention among proposals, dynamic interaction with their RoIs, class and box.

    Parameter names follow the official checkpoints. No parameter depends on the number of proposals
    or groups.
    """

    @configurable
    def __init__(
        self,
        *,
        settings: StageSettings,
        dynamic_channels: int,
        roi_positions: int,
        dropout: float = 0.0,
        tower_activation: str = "relu",
        box_weights: tuple[float, float, float, float] = BOX_WEIGHTS,
    ) -> None:
        """Build one stage.

        Args:
            settings: sizes.
            dynamic_channels: channels between the two dynamic convolutions.
            roi_positions: ``K``.
            dropout: dropout of attention, interaction and feed-forward network.
            tower_activation: of the towers.
            box_weights: divisors of the predicted ``dx, dy, dw, dh``, see `apply_deltas`.
        """
        super().__init__()
        self.box_weights = box_weights
        channels, hidden = settings.channels, settings.feedforward_channels
        self.self_attn = nn.MultiheadAttention(
            channels, settings.attention_heads, dropout=dropout, batch_first=True
        )
        self.inst_interact = DynamicConv(channels, dynamic_channels, roi_positions)
        self.linear1 = nn.Linear(channels, hidden)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(hidden, channels)
        self.norm1 = nn.LayerNorm(channels)
        self.norm2 = nn.LayerNorm(channels)
        self.norm3 = nn.LayerNorm(channels)
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)
        self.dropout3 = nn.Dropout(dropout)
        self.activation = activation_from_name(settings.activation)
        self.cls_module = linear_norm_act(channels, settings.num_cls, activation=tower_activation)
        self.reg_module = linear_norm_act(channels, settings.num_reg, activation=tower_activation)
        self.class_logits = nn.Linear(channels, settings.num_logits)
        self.bboxes_delta = nn.Linear(channels, 4)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read `MODEL.SparseRCNN` and the resolution of the pooler."""
        node = cfg.MODEL.SparseRCNN
        return {
            "settings": StageSettings.from_config(cfg),
            "dynamic_channels": node.DIM_DYNAMIC,
            "roi_positions": cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION**2,
            "dropout": node.DROPOUT,
            "box_weights": tuple(node.BOX_WEIGHTS),
        }

    def initialize(self, prior_probability: float | None) -> None:
        """Initialize matrices by Xavier and, with focal loss, the classifier's bias by the prior.

        The official code selects the classifier by the size of its last axis, which also matches
        other parameters for some class counts; here it is addressed by name.
        """
        initialize_xavier(self)
        if prior_probability is not None:
            nn.init.constant_(self.class_logits.bias, prior_bias(prior_probability))

    def forward(
        self,
        roi_features: Tensor,
        boxes: Tensor,
        proposal_features: Tensor,
        mask: Tensor | None = None,
        *,
        classify: bool = True,
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Refine every proposal once.

        Args:
            roi_features: (B * G * P, K, D), pooled at `boxes`.
            boxes: (B, G, P, 4) xyxy in pixels.
            proposal_features: (B, G, P, D).
            mask: (B, P) or (B, P, P) bool, False for keys to ignore; with one group.
            classify: False leaves the logits out.

        Returns:
            Logits (B, G, P, C) or None, boxes (B, G, P, 4) and object features (B, G, P, D), the
            proposal features of the next stage.
        """
        attended = self._attend(proposal_features, mask)
        features = self.norm1(proposal_features + self.dropout1(attended))
        interaction = self.inst_interact(features.flatten(0, 2), roi_features).view_as(features)
        features = self.norm2(features + self.dropout2(interaction))
        hidden = self.dropout(self.activation(self.linear1(features)))
        features = self.norm3(features + self.dropout3(self.linear2(hidden)))
        logits = self.class_logits(self.cls_module(features)) if classify else None
        tower = self.reg_module(features)
        # The deltas stay float32 under autocast, as the boxes do.
        with torch.autocast(tower.device.type, enabled=False):
            deltas = self.bboxes_delta(tower.to(self.bboxes_delta.weight.dtype))
        return logits, apply_deltas(deltas, boxes, self.box_weights), features

    def _attend(self, features: Tensor, mask: Tensor | None) -> Tensor:
        """Self-attention among the proposals of one group of one image."""
        x = features.flatten(0, 1)
        ignored = None
        if mask is not None:
            pairs = mask if mask.dim() == 3 else mask.unsqueeze(1).expand(-1, x.shape[1], -1)
            ignored = ~pairs.repeat_interleave(self.self_attn.num_heads, dim=0)
        x = x.to(autocast_dtype(x))  # once, not for each of the three
        attended = self.self_attn(x, x, x, attn_mask=ignored, need_weights=False)[0]
        return attended.view_as(features)
