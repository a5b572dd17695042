"""AdaMixer (arXiv 2203.16507): the whole detector."""

from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY

from ...config.validate import check_adamixer, check_unused
from ..decoder.adamixer import UNUSED_KEYS, AdaMixerDecoder
from .sparse_rcnn import SparseRCNN


@META_ARCH_REGISTRY.register()
class AdaMixer(SparseRCNN):
    """Sparse R-CNN with AdaMixer's decoder and content queries.

    Matching, losses, DLA, DPG, SQR and post-processing are those of `SparseRCNN`, with their keys
    under ``MODEL.SparseRCNN``; ``MODEL.AdaMixer`` has those of the decoder.
    """

    default_proposals = "ContentQueries"

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read the whole model from a config."""
        return {**super().from_config(cfg), "head": AdaMixerDecoder(cfg)}

    @classmethod
    def check_config(cls, cfg: CfgNode) -> None:
        """Check the keys of cascades and of the decoder."""
        super().check_config(cfg)
        check_adamixer(cfg)
        check_unused(cfg, {**UNUSED_KEYS, "MODEL.SparseRCNN.DROPOUT": 0.0})
        if not cfg.MODEL.SparseRCNN.DPG.ENABLED and not cfg.MODEL.SparseRCNN.PROPOSALS.NAME:
            check_unused(cfg, {"MODEL.SparseRCNN.PROPOSALS.BOXES": "image"})
