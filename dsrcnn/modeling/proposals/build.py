"""Registry and builder of proposals."""

from detectron2.config import CfgNode
from detectron2.utils.registry import Registry
from torch import nn

__all__ = ["PROPOSALS_REGISTRY", "ProposalSource", "build_proposals"]

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


def build_proposals(cfg: CfgNode) -> ProposalSource:
    """Learned proposals, or with ``MODEL.SparseRCNN.DPG.ENABLED`` those mixed for each image.

    AdaMixer's are learned in a way of their own.
    """
    name = "ContentQueries" if cfg.MODEL.META_ARCHITECTURE == "AdaMixer" else "LearnedProposals"
    if cfg.MODEL.SparseRCNN.DPG.ENABLED:
        name = "DynamicProposals"
    source: ProposalSource = PROPOSALS_REGISTRY.get(name)(cfg)
    return source
