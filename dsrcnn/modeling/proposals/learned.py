"""Learned proposals: one set for all images (Sparse R-CNN, arXiv 2011.12450, section 3.1)."""

import torch
from detectron2.config import CfgNode, configurable
from detectron2.utils.registry import Registry
from torch import Tensor, nn

from ...structures import Proposals, box_cxcywh_to_xyxy
from .initial_boxes import initial_boxes

__all__ = ["PROPOSALS_REGISTRY", "LearnedProposals", "ProposalSource"]

PROPOSALS_REGISTRY = Registry("PROPOSALS")
PROPOSALS_REGISTRY.__doc__ = """
Sources of proposals: what the cascade starts from.

A source is built from a config and called as ``source(features, sizes)`` with pyramid levels
(B, D, H_l, W_l), finest first, and sizes (B, 4) as ``w, h, w, h`` in pixels. It returns
`Proposals`. It is a `ProposalSource`, which is told about the end of every training iteration.
"""


class ProposalSource(nn.Module):
    """What all sources of proposals have in common."""

    def end_iteration(self) -> None:
        """A training iteration is over; for schedules. A batch may have come in several parts."""


@PROPOSALS_REGISTRY.register()
class LearnedProposals(ProposalSource):
    """`P` boxes and features that are parameters; every image starts from the same ones.

    Attributes:
        init_proposal_boxes: (P, 4) centre and size as fractions of the image.
        init_proposal_features: (P, D).
    """

    @configurable
    def __init__(self, *, num_proposals: int, channels: int, boxes: str = "image") -> None:
        """Start features as N(0, 1).

        Args:
            num_proposals: ``P``.
            channels: ``D``.
            boxes: where boxes start, see `initial_boxes`; officially as the whole image.
        """
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
        """Scale the boxes to each image.

        Args:
            features: pyramid levels; learned proposals do not look at them.
            sizes: (B, 4) ``w, h, w, h`` of each image in pixels.

        Returns:
            Boxes (B, P, 4) xyxy in pixels and features (B, P, D).
        """
        boxes_unit = box_cxcywh_to_xyxy(self.init_proposal_boxes.weight)
        boxes = boxes_unit * sizes.unsqueeze(1)
        return Proposals(boxes, self.init_proposal_features.weight.expand(len(sizes), -1, -1))
