"""From anchors to proposals: what is at an anchor, how anchors lie to each other, a first guess.

ASAG, arXiv 2308.09242, section 3.3. Letters: ``B`` images, ``N`` anchors, ``D`` channels, ``C``
classes.
"""

from typing import Any, NamedTuple

from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from ..decoder import PositionalStage

__all__ = ["InitialQueries", "QueryInitializer", "attention_mask"]


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
