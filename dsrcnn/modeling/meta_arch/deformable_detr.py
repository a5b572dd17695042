"""Deformable DETR (arXiv 2010.04159): the whole detector."""

from typing import Any, cast

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor

from ...config import rules
from ...config.rules import check_table
from ...config.validate import check_unused
from ...errors import ConfigError
from ...layers.deformable_attention import TokenPyramid
from ...structures import BOX_WEIGHTS
from ..decoder.deformable import DeformableDecoder, DeformableStage
from ..encoder import DeformableEncoder
from ..losses.criterion import SetCriterion
from ..matching.matcher import build_matcher
from ..proposals.build import PROPOSALS_REGISTRY, build_proposals
from ..proposals.encoded import EncoderQueries
from ..proposals.learned import LearnedQueries
from .base import ImageBatch
from .sparse_rcnn import SparseRCNN

UNUSED_KEYS = {
    "MODEL.SparseRCNN.BOX_WEIGHTS": BOX_WEIGHTS,
    "MODEL.SparseRCNN.PROPOSALS.BOXES": "image",
    "MODEL.SparseRCNN.NUM_CLS": 1,
    "MODEL.SparseRCNN.NUM_REG": 3,
}


@META_ARCH_REGISTRY.register()
class DeformableDETR(SparseRCNN):
    """Encoder and decoder of deformable attention in place of RoIs.

    Matching, losses, DLA, SQR and post-processing are those of `SparseRCNN`, with their keys under
    ``MODEL.SparseRCNN``; ``MODEL.DeformableDETR`` has what is new. With the proposals
    `EncoderQueries` it is the two-stage variant.
    """

    default_proposals = "LearnedQueries"
    takes_queries = True

    @configurable
    def __init__(self, *, encoder: DeformableEncoder, **shared: Any) -> None:
        """Assemble the detector.

        Args:
            encoder: levels and sizes to encoded tokens.
            **shared: see `SparseRCNN`.
        """
        super().__init__(**shared)
        self.encoder = encoder
        if isinstance(self.proposals, LearnedQueries):
            cast(DeformableStage, self.head.head_series[0]).start_with_small_boxes()

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
        check_table(cfg, rules.DEFORMABLE_DETR, "MODEL.DeformableDETR")
        check_unused(cfg, UNUSED_KEYS)
        node, key = cfg.MODEL.SparseRCNN, "MODEL.SparseRCNN"
        if node.HIDDEN_DIM % 4:
            raise ConfigError(
                f"{key}.HIDDEN_DIM is {node.HIDDEN_DIM}; {cfg.MODEL.META_ARCHITECTURE} encodes "
                "places by sines and cosines of x and y. Write a multiple of 4."
            )
        if node.DPG.ENABLED:
            raise ConfigError(
                f"{key}.DPG.ENABLED is True, but {cfg.MODEL.META_ARCHITECTURE} has no learned "
                f"boxes to mix. Write {key}.DPG.ENABLED False."
            )
        if node.SHARE_STAGES:
            raise ConfigError(
                f"{key}.SHARE_STAGES is True, but {cfg.MODEL.META_ARCHITECTURE} shares no stages. "
                f"Write {key}.SHARE_STAGES False."
            )
        check_config_of_proposals(cfg)

    @property
    def all_parameters_get_gradients(self) -> bool:
        """Whether the encoder has layers, too: without them its embeddings of levels are unused."""
        return len(self.encoder.layers) > 0 and super().all_parameters_get_gradients

    def encode_features(self, features: list[Tensor], images: ImageBatch) -> TokenPyramid:
        """Compute the encoded tokens, which proposals and decoder read."""
        height, width = images.tensor.shape[-2:]
        pyramid: TokenPyramid = self.encoder(features, images.sizes, (int(height), int(width)))
        return pyramid


def check_config_of_proposals(cfg: CfgNode) -> None:
    """Check that the source of proposals fits the decoder."""
    name, key = cfg.MODEL.SparseRCNN.PROPOSALS.NAME, "MODEL.SparseRCNN.PROPOSALS.NAME"
    source = PROPOSALS_REGISTRY.get(name) if name else LearnedQueries
    if issubclass(source, EncoderQueries) and not cfg.MODEL.DeformableDETR.BOX_REFINEMENT:
        raise ConfigError(
            f"{key} is {name!r}, whose queries start from boxes, but MODEL.DeformableDETR."
            "BOX_REFINEMENT is False. Write MODEL.DeformableDETR.BOX_REFINEMENT True."
        )
