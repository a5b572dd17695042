"""AdaMixer (arXiv 2203.16507): the whole detector."""

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY

from ..decoder import AdaMixerDecoder
from .sparse_rcnn import SparseRCNN

__all__ = ["AdaMixer"]


@META_ARCH_REGISTRY.register()
class AdaMixer(SparseRCNN):
    """Sparse R-CNN's way of the data with another decoder and another kind of proposals.

    Matching, losses, DLA, DPG, SQR and postprocessing are the same; so are their keys, under
    ``MODEL.SparseRCNN``. ``MODEL.AdaMixer`` has those of the decoder.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        """Read the whole model from a config."""
        return {**super().from_config(cfg), "head": AdaMixerDecoder(cfg)}
