"""Learned proposals, the same for all images, and where their boxes start."""

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from ...errors import ConfigError
from ...layers.deformable_attention import PointLinear
from ...structures import Proposals, box_cxcywh_to_xyxy
from .build import PROPOSALS_REGISTRY, ProposalSource

INITIAL_BOXES = ("image", "center", "grid", "random")


def initial_boxes(mode: str, count: int) -> Tensor:
    """Make initial boxes as fractions of the image.

    Args:
        mode: "image": the whole image (Sparse R-CNN). "center": its middle, half as wide and high.
            "grid": cells of a regular grid over the image. "random": between two uniform points.
        count: ``P``.

    Returns:
        (P, 4) center and size.

    Raises:
        ConfigError: for another mode.
    """
    if mode == "image":
        return torch.tensor([0.5, 0.5, 1.0, 1.0]).repeat(count, 1)
    if mode == "center":
        return torch.tensor([0.5, 0.5, 0.5, 0.5]).repeat(count, 1)
    if mode == "grid":
        columns = math.ceil(math.sqrt(count))
        rows = math.ceil(count / columns)
        index = torch.arange(count)
        x = (index % columns + 0.5) / columns
        y = (index // columns + 0.5) / rows
        size = torch.tensor([1 / columns, 1 / rows]).repeat(count, 1)
        return torch.cat([torch.stack([x, y], dim=1), size], dim=1)
    if mode == "random":
        corners = torch.rand(count, 2, 2).sort(dim=1).values
        return torch.cat([corners.mean(dim=1), corners[:, 1] - corners[:, 0]], dim=1)
    raise ConfigError(
        f"MODEL.SparseRCNN.PROPOSALS.BOXES is {mode!r}; write one of {', '.join(INITIAL_BOXES)}."
    )


@PROPOSALS_REGISTRY.register()
class LearnedProposals(ProposalSource):
    """`P` learned boxes and features (Sparse R-CNN, arXiv 2011.12450, section 3.1).

    Attributes:
        init_proposal_boxes: (P, 4) center and size as fractions of the image.
        init_proposal_features: (P, D).
    """

    proposal_dimensions: ClassVar[Mapping[str, int]] = {
        "init_proposal_features.weight": 0,
        "init_proposal_boxes.weight": 0,
    }

    @configurable
    def __init__(self, *, num_proposals: int, channels: int, boxes: str = "image") -> None:
        """Initialize ``P`` features of ``D`` channels from N(0, 1), boxes by `initial_boxes`."""
        super().__init__()
        self.init_proposal_features = nn.Embedding(num_proposals, channels)
        self.init_proposal_boxes = nn.Embedding(num_proposals, 4)
        with torch.no_grad():
            self.init_proposal_boxes.weight.copy_(initial_boxes(boxes, num_proposals))

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        """Read `MODEL.SparseRCNN`."""
        node = cfg.MODEL.SparseRCNN
        return {
            "num_proposals": node.NUM_PROPOSALS,
            "channels": node.HIDDEN_DIM,
            "boxes": node.PROPOSALS.BOXES,
        }

    def forward(self, features: list[Tensor], sizes: Tensor) -> Proposals:
        """Scale the boxes to images of `sizes` (B, 4), ``w, h, w, h``; `features` are not used.

        Returns boxes (B, P, 4) xyxy in pixels and features (B, P, D).
        """
        boxes = box_cxcywh_to_xyxy(self.init_proposal_boxes.weight) * sizes.unsqueeze(1)
        return Proposals(boxes, self.init_proposal_features.weight.expand(sizes.shape[0], -1, -1))


@PROPOSALS_REGISTRY.register()
class ContentQueries(ProposalSource):
    """`P` learned features in boxes that are the whole image (AdaMixer, 2203.16507, section 3.1).

    Attributes:
        init_proposal_features: (P, D), standardized for each proposal in use.
    """

    proposal_dimensions: ClassVar[Mapping[str, int]] = {"init_proposal_features.weight": 0}

    @configurable
    def __init__(self, *, num_proposals: int, channels: int) -> None:
        super().__init__()
        self.init_proposal_features = nn.Embedding(num_proposals, channels)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        """Read `MODEL.SparseRCNN`."""
        node = cfg.MODEL.SparseRCNN
        return {"num_proposals": node.NUM_PROPOSALS, "channels": node.HIDDEN_DIM}

    def forward(self, features: list[Tensor], sizes: Tensor) -> Proposals:
        """Place the queries in boxes of the size of each image, see `LearnedProposals`."""
        weight = self.init_proposal_features.weight
        states = F.layer_norm(weight, weight.shape[-1:]).expand(sizes.shape[0], -1, -1)
        corners = torch.cat([torch.zeros_like(sizes[:, :2]), sizes[:, 2:]], dim=1)
        return Proposals(corners.unsqueeze(1).expand(-1, len(weight), -1), states)


@PROPOSALS_REGISTRY.register()
class LearnedQueries(ProposalSource):
    """`P` learned queries at points of the image (Deformable DETR, arXiv 2010.04159, section 4.2).

    A query is the encoding of a position and a content, side by side. Its box is a point, which the
    position predicts.

    Attributes:
        init_proposal_features: (P, 2 * D) position and content.
    """

    proposal_dimensions: ClassVar[Mapping[str, int]] = {"init_proposal_features.weight": 0}

    gives_queries = True

    @configurable
    def __init__(self, *, num_proposals: int, channels: int) -> None:
        """Initialize ``P`` queries of twice ``D`` channels from N(0, 1)."""
        super().__init__()
        self.init_proposal_features = nn.Embedding(num_proposals, 2 * channels)
        self.reference_points = PointLinear(channels, 2)
        nn.init.xavier_uniform_(self.reference_points.weight)
        nn.init.zeros_(self.reference_points.bias)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        """Read `MODEL.SparseRCNN`."""
        node = cfg.MODEL.SparseRCNN
        return {"num_proposals": node.NUM_PROPOSALS, "channels": node.HIDDEN_DIM}

    def forward(self, features: object, sizes: Tensor) -> Proposals:
        """Place the queries in images of `sizes` (B, 4), ``w, h, w, h``; `features` are not used.

        Returns boxes (B, P, 4) without size, xyxy in pixels, and features (B, P, 2 * D).
        """
        queries = self.init_proposal_features.weight
        with torch.autocast(queries.device.type, enabled=False):  # half precision has few places
            points = self.reference_points(queries.chunk(2, dim=1)[0]).sigmoid()
            boxes = points.repeat(1, 2) * sizes.unsqueeze(1)
        return Proposals(boxes, queries.expand(sizes.shape[0], -1, -1))
