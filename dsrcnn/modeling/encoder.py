"""The encoder of Deformable DETR (arXiv 2010.04159, section 4.2).

Tokens of all levels attend to points in all levels, so levels are fused without a pyramid network.
"""

import math
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from ..layers.activation_checkpoint import checkpointed
from ..layers.blocks import activation_from_name, initialize_xavier
from ..layers.deformable_attention import (
    DeformableAttention,
    References,
    Shape,
    TokenPyramid,
)
from ..layers.relation_attention import encode_by_waves
from ..utils.compilation import compile_mode
from .decoder.deformable import POINTS
from .decoder.rcnn_head import StageSettings


class EncoderLayer(nn.Module):
    """Deformable attention among tokens and a feed-forward network."""

    def __init__(self, settings: StageSettings, levels: int, dropout: float) -> None:
        """Build the layer for a number of pyramid levels."""
        super().__init__()
        channels, hidden = settings.channels, settings.feedforward_channels
        self.self_attn = DeformableAttention(channels, settings.attention_heads, levels, POINTS)
        self.linear1 = nn.Linear(channels, hidden)
        self.linear2 = nn.Linear(hidden, channels)
        self.norm1 = nn.LayerNorm(channels)
        self.norm2 = nn.LayerNorm(channels)
        self.activation = activation_from_name(settings.activation)
        self.dropout = nn.Dropout(dropout)
        for layer in (self.linear1, self.linear2):
            initialize_xavier(layer)

    def forward(
        self, tokens: Tensor, positions: Tensor, references: References, pyramid: TokenPyramid
    ) -> Tensor:
        """Update tokens (B, N, D) at encoded positions (B, N, D); returns the same shape."""
        attended = self.self_attn(tokens + positions, references, pyramid._replace(tokens=tokens))
        tokens = self.norm1(tokens + self.dropout(attended))
        hidden = self.linear2(self.dropout(self.activation(self.linear1(tokens))))
        result: Tensor = self.norm2(tokens + self.dropout(hidden))
        return result


class DeformableEncoder(nn.Module):
    """Layers that refine the tokens of a pyramid.

    Attributes:
        level_embed: (L, D), added to the positions of each level.
    """

    @configurable
    def __init__(
        self,
        *,
        settings: StageSettings,
        levels: int,
        num_layers: int,
        dropout: float,
        checkpoint: bool,
        compile_mode: str,
    ) -> None:
        """Build the encoder.

        Args:
            settings: sizes.
            levels: ``L``.
            num_layers: number of layers.
            dropout: dropout of attention and feed-forward network.
            checkpoint: recompute the activations of each layer in the backward pass.
            compile_mode: of ``torch.compile`` for the layers; empty: not compiled.
        """
        super().__init__()
        self.level_embed = nn.Parameter(torch.randn(levels, settings.channels))
        self.layers = nn.ModuleList(
            EncoderLayer(settings, levels, dropout) for _ in range(num_layers)
        )
        self.checkpoint = checkpoint
        if compile_mode:
            for layer in self.layers:
                layer.compile(mode=compile_mode, dynamic=True)  # see DeformableDecoder

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read `MODEL.DeformableDETR` and `MODEL.SparseRCNN`."""
        return {
            "settings": StageSettings.from_config(cfg),
            "levels": len(cfg.MODEL.ROI_HEADS.IN_FEATURES),
            "num_layers": cfg.MODEL.DeformableDETR.ENCODER_LAYERS,
            "dropout": cfg.MODEL.SparseRCNN.DROPOUT,
            "checkpoint": "stages" in cfg.MODEL.ACTIVATION_CHECKPOINT,
            "compile_mode": compile_mode(cfg),
        }

    def forward(self, levels: list[Tensor], sizes: Tensor, padded: Shape) -> TokenPyramid:
        """Encode a pyramid.

        Args:
            levels: (B, D, H_l, W_l), finest first.
            sizes: (B, 4) ``w, h, w, h`` of the images before padding, in pixels.
            padded: height and width of the padded images.

        Returns:
            The encoded tokens.
        """
        pyramid = TokenPyramid.from_levels(levels, sizes, padded)
        tokens = pyramid.tokens
        positions = self._positions(pyramid).to(tokens.dtype)
        references = References.at_tokens(pyramid)
        for layer in self.layers:
            arguments = (tokens, positions, references, pyramid)
            if self.checkpoint and self.training and torch.is_grad_enabled():
                tokens = checkpointed(layer, layer, *arguments)
            else:
                tokens = layer(*arguments)
        return pyramid._replace(tokens=tokens)

    def _positions(self, pyramid: TokenPyramid) -> Tensor:
        """Encode the places of tokens, rows first, and their levels, (B, N, D)."""
        channels = self.level_embed.shape[1]
        angles = pyramid.places.flip(-1) * (2 * math.pi)
        counts = [height * width for height, width in pyramid.shapes]
        of_levels = [x.expand(n, -1) for x, n in zip(self.level_embed, counts, strict=True)]
        return encode_by_waves(angles, channels // 2) + torch.cat(of_levels)
