"""Deformable DETR (arXiv 2010.04159): the whole detector."""

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY

from ...config.validate import check_deformable_detr, check_name
from ...errors import ConfigError
from ...layers.deformable_attention import TokenPyramid
from ..decoder.deformable import DeformableDecoder
from ..encoder import DeformableEncoder
from ..losses.criterion import SetCriterion
from ..matching.matcher import build_matcher
from ..proposals.build import PROPOSALS_REGISTRY, build_proposals
from ..proposals.learned import LearnedQueries
from .base import ImageBatch
from .sparse_rcnn import SparseRCNN


@META_ARCH_REGISTRY.register()
class DeformableDETR(SparseRCNN):
    """Encoder and decoder of deformable attention in place of RoIs.

    Matching, losses, DLA, SQR and post-processing are those of `SparseRCNN`, with their keys under
    ``MODEL.SparseRCNN``; ``MODEL.DeformableDETR`` has what is new.
    """

    default_proposals = "LearnedQueries"

    @configurable
    def __init__(self, *, encoder: DeformableEncoder, **shared: Any) -> None:
        """Assemble the detector.

        Args:
            encoder: levels and sizes to encoded tokens.
            **shared: see `SparseRCNN`.
        """
        super().__init__(**shared)
        self.encoder = encoder

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read the whole model from a config."""
        return {
            **super(SparseRCNN, cls).from_config(cfg),  # Sparse R-CNN's has another head
            "encoder": DeformableEncoder(cfg),
            "proposals": build_proposals(cfg, cls.default_proposals),
            "head": DeformableDecoder(cfg),
            "matcher": build_matcher(cfg, l1_of_centers=True),
            "criterion": SetCriterion(cfg, l1_of_centers=True),
        }

    @classmethod
    def check_config(cls, cfg: CfgNode) -> None:
        """Check the keys of cascades and of Deformable DETR."""
        super().check_config(cfg)
        check_deformable_detr(cfg)
        name, key = cfg.MODEL.SparseRCNN.PROPOSALS.NAME, "MODEL.SparseRCNN.PROPOSALS.NAME"
        if not name:
            return
        check_name(key, name, PROPOSALS_REGISTRY)
        if not issubclass(PROPOSALS_REGISTRY.get(name), LearnedQueries):
            raise ConfigError(
                f"{key} is {name!r}, but {cfg.MODEL.META_ARCHITECTURE} needs queries with a "
                "position and a content. Write LearnedQueries or a subclass of it."
            )

    def encode(self, images: ImageBatch) -> TokenPyramid:
        """Compute the encoded tokens, which proposals and decoder read."""
        height, width = images.tensor.shape[-2:]
        levels = self.extract_features(images)
        pyramid: TokenPyramid = self.encoder(levels, images.sizes, (int(height), int(width)))
        return pyramid
