"""Queries of AdaMixer: learned features in boxes that are the whole image."""

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from ...structures import Proposals
from .learned import PROPOSALS_REGISTRY, ProposalSource

__all__ = ["ContentQueries"]


@PROPOSALS_REGISTRY.register()
class ContentQueries(ProposalSource):
    """`P` features that are parameters; boxes are not learned (arXiv 2203.16507, section 3.1).

    Attributes:
        init_proposal_features: (P, D), standardized for each proposal when they are used.
    """

    @configurable
    def __init__(self, *, num_proposals: int, channels: int) -> None:
        """Start features as N(0, 1).

        Args:
            num_proposals: ``P``.
            channels: ``D``.
        """
        super().__init__()
        self.init_proposal_features = nn.Embedding(num_proposals, channels)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        """Read `MODEL.SparseRCNN`."""
        node = cfg.MODEL.SparseRCNN
        return {"num_proposals": node.NUM_PROPOSALS, "channels": node.HIDDEN_DIM}

    def forward(self, features: list[Tensor], sizes: Tensor) -> Proposals:
        """The same features for all images, in boxes as large as each.

        Args:
            features: pyramid levels; they are not looked at.
            sizes: (B, 4) ``w, h, w, h`` of each image in pixels.

        Returns:
            Boxes (B, P, 4) xyxy in pixels and features (B, P, D).
        """
        weight = self.init_proposal_features.weight
        states = F.layer_norm(weight, weight.shape[-1:]).expand(len(sizes), -1, -1)
        corners = torch.cat([torch.zeros_like(sizes[:, :2]), sizes[:, 2:]], dim=1)
        return Proposals(corners.unsqueeze(1).expand(-1, len(weight), -1), states)
