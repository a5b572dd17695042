"""The decoder of Deformable DETR (arXiv 2010.04159, section 4.2 and appendix A.4).

Stages of self-attention among queries and deformable attention to the encoded pyramid. Inside of a
stage boxes are center and size as fractions of the image.

Without two stages, queries start as points, and only the first stage turns them into boxes. A point
is a box of no size here: it samples at distances of cells instead of parts of its sides
(`References.at_boxes`), and its sides are what the first change says alone (`move_boxes`).

Notation: ``G`` groups of queries.
"""

from typing import Any, cast

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from ...layers.blocks import activation_from_name, initialize_xavier, prior_bias
from ...layers.deformable_attention import DeformableAttention, References, TokenPyramid
from ...layers.norm import autocast_dtype
from ...structures import at_least_float32, box_cxcywh_to_xyxy, box_xyxy_to_cxcywh
from .cascade import Cascade
from .rcnn_head import Stage, StageSettings, stride_of

POINTS = 4  # of a head and level, as published
_MARGIN = 1e-5  # least distance of a fraction from 0 and 1 before its logit
_SMALL = -2.0  # logit of the sides of the first boxes


class DeformableStage(Stage):
    """Self-attention, deformable attention at boxes, feed-forward network, class and box.

    Parameter names of the attention and the feed-forward network are the official ones.
    """

    @configurable
    def __init__(self, *, settings: StageSettings, levels: int, dropout: float) -> None:
        """Build one stage.

        Args:
            settings: sizes; the class has one layer and the box three, as published.
            levels: ``L``.
            dropout: dropout of attention and feed-forward network.
        """
        super().__init__()
        channels, hidden = settings.channels, settings.feedforward_channels
        heads = settings.attention_heads
        self.self_attn = nn.MultiheadAttention(channels, heads, dropout=dropout, batch_first=True)
        self.cross_attn = DeformableAttention(channels, heads, levels, POINTS)
        self.linear1 = nn.Linear(channels, hidden)
        self.linear2 = nn.Linear(hidden, channels)
        self.norm1 = nn.LayerNorm(channels)
        self.norm2 = nn.LayerNorm(channels)
        self.norm3 = nn.LayerNorm(channels)
        self.activation = activation_from_name(settings.activation)
        self.dropout = nn.Dropout(dropout)
        self.class_embed = nn.Linear(channels, settings.num_logits)
        self.bbox_embed = box_network(channels)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read `MODEL.SparseRCNN`."""
        return {
            "settings": StageSettings.from_config(cfg),
            "levels": len(cfg.MODEL.ROI_HEADS.IN_FEATURES),
            "dropout": cfg.MODEL.SparseRCNN.DROPOUT,
        }

    def initialize(self, prior_probability: float | None) -> None:
        """Initialize by Xavier; boxes start unchanged, classes at the prior if there is one."""
        for part in (self.self_attn, self.linear1, self.linear2):
            initialize_xavier(part)
        self.cross_attn.initialize()
        initialize_predictions(self.class_embed, self.bbox_embed, prior_probability)

    @torch.no_grad()
    def start_with_small_boxes(self) -> None:
        """Let sides start from an eighth of the image: the boxes of this stage are points."""
        cast(nn.Linear, self.bbox_embed[-1]).bias[2:].fill_(_SMALL)

    def forward(
        self, pyramid: TokenPyramid, boxes: Tensor, states: Tensor, *, classify: bool = True
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Refine every query once.

        Args:
            pyramid: of the images.
            boxes: (B, G, P, 4) xyxy in pixels, points of no size.
            states: (B, G, P, 2 * D) position and content of the queries.
            classify: False leaves the logits out.

        Returns:
            Logits (B, G, P, C) or None, boxes (B, G, P, 4) and states with the new content.
        """
        position, content = states.chunk(2, dim=-1)
        # Norms are numbered as officially, where cross-attention was written first.
        content = self.norm2(content + self.dropout(self._attend(position, content)))
        with torch.autocast(boxes.device.type, enabled=False):
            sizes = pyramid.sizes.view(-1, 1, 1, 4)
            fractions = box_xyxy_to_cxcywh(at_least_float32(boxes)) / sizes
            # The groups of an image share its tokens.
            references = References.at_boxes(fractions.flatten(1, 2), pyramid, POINTS)
        queries = (content + position).flatten(1, 2)
        attended = self.cross_attn(queries, references, pyramid).view_as(content)
        content = self.norm1(content + self.dropout(attended))
        hidden = self.linear2(self.dropout(self.activation(self.linear1(content))))
        content = self.norm3(content + self.dropout(hidden))
        logits = self.class_embed(content) if classify else None
        with torch.autocast(boxes.device.type, enabled=False):
            moved = move_boxes(self.bbox_embed, content, fractions)
            boxes = box_cxcywh_to_xyxy(moved) * sizes
        return logits, boxes, torch.cat([position, content.to(position.dtype)], dim=-1)

    def _attend(self, position: Tensor, content: Tensor) -> Tensor:
        """Self-attention among the queries of one group of one image."""
        queries = (content + position).flatten(0, 1)
        queries = queries.to(autocast_dtype(queries))  # once, not for queries and keys
        values = content.flatten(0, 1).to(queries.dtype)
        attended: Tensor = self.self_attn(queries, queries, values, need_weights=False)[0]
        return attended.view_as(content)


def box_network(channels: int) -> nn.Sequential:
    """Build the three layers that predict the change of a box."""
    layers = [nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, channels), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(channels, 4))


def initialize_predictions(
    classes: nn.Linear, boxes: nn.Sequential, prior_probability: float | None
) -> None:
    """Let boxes start unchanged and classes at the prior, None for softmax classification."""
    for layer in (classes, *boxes):
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
    last = cast(nn.Linear, boxes[-1])
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    if prior_probability is not None:
        nn.init.constant_(classes.bias, prior_bias(prior_probability))


def move_boxes(network: nn.Sequential, content: Tensor, boxes: Tensor) -> Tensor:
    """Add predicted changes to the logits of boxes (appendix A.4), never in half precision.

    Args:
        network: of `box_network`.
        content: (..., D).
        boxes: (..., 4) center and size as fractions; a side of zero adds nothing to its change.

    Returns:
        (..., 4) center and size as fractions; no side is below 1e-5.
    """
    changes = network(content.to(cast(nn.Linear, network[0]).weight.dtype)).to(boxes.dtype)
    start = torch.logit(boxes, eps=_MARGIN)
    center, size = start.split(2, dim=-1)
    size = torch.where(boxes[..., 2:] > 0, size, 0.0)
    moved = (torch.cat([center, size], dim=-1) + changes).sigmoid()
    # However small, it is no point: those have no side at all, only before their first change.
    return torch.cat([moved[..., :2], moved[..., 2:].clamp(min=_MARGIN)], dim=-1)


class DeformableDecoder(Cascade):
    """Cascade whose stages attend to the encoded pyramid."""

    @configurable
    def __init__(
        self,
        *,
        stage: DeformableStage,
        strides: tuple[int, ...],
        refines_boxes: bool,
        compile_mode: str = "",
        **kwargs: Any,
    ) -> None:
        """Build the stages; other arguments are those of `Cascade`.

        Args:
            stage: the stage to copy.
            strides: of the levels, finest first.
            refines_boxes: iterative bounding box refinement: each stage starts from the boxes of
                the one before, and has a classifier and a box network of its own. Otherwise all
                stages start from the initial boxes and share both.
            compile_mode: of ``torch.compile`` for the stages; empty: not compiled.
            **kwargs: see `Cascade`.
        """
        super().__init__(stage=stage, **kwargs)
        if compile_mode:
            for member in self.head_series:
                # Stages see the shapes of levels. With a graph for the first size, one for any
                # height and one for any width, there would be more graphs than torch keeps.
                member.compile(mode=compile_mode, dynamic=True)
        self.strides, self.refines_boxes = strides, refines_boxes
        first, *others = (cast(DeformableStage, x) for x in self.head_series)
        if not refines_boxes:
            for member in others:
                member.class_embed, member.bbox_embed = first.class_embed, first.bbox_embed

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read `MODEL.SparseRCNN` and `MODEL.DeformableDETR`."""
        return {
            **super().from_config(cfg),
            "stage": DeformableStage(cfg),
            "strides": tuple(stride_of(name) for name in cfg.MODEL.ROI_HEADS.IN_FEATURES),
            "refines_boxes": cfg.MODEL.DeformableDETR.BOX_REFINEMENT,
        }

    def prepare(self, features: TokenPyramid) -> TokenPyramid:  # type: ignore[override]
        """Return the encoded pyramid as it is."""
        return features

    def run_stage(
        self,
        stage: nn.Module,
        pyramid: TokenPyramid,
        boxes: Tensor,
        states: Tensor,
        *,
        classify: bool,
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Refine the queries by attention to the pyramid."""
        return stage(pyramid, boxes, states, classify=classify)
