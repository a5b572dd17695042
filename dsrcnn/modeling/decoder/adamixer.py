"""The decoder of AdaMixer (arXiv 2203.16507): a cascade whose stages sample the pyramid freely."""

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from ...layers.point_sampling import GroupedPyramid
from ...structures import at_least_float32
from .adamixer_stage import AdaMixerStage
from .cascade import Cascade
from .roi_features import stride_of

__all__ = ["AdaMixerDecoder"]


class AdaMixerDecoder(Cascade):
    """Stages read every level of the pyramid at points that the proposals choose."""

    @configurable
    def __init__(self, *, stage: AdaMixerStage, strides: tuple[int, ...], **kwargs: Any) -> None:
        """Set the pyramid.

        Args:
            stage: the stage to copy.
            strides: of the levels, finest first.
            **kwargs: of `Cascade`.
        """
        super().__init__(stage=stage, **kwargs)
        self.strides = strides
        self.groups = stage.groups

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        """Read `MODEL.SparseRCNN` and `MODEL.AdaMixer`."""
        strides = tuple(stride_of(name) for name in cfg.MODEL.ROI_HEADS.IN_FEATURES)
        return {**super().from_config(cfg), "stage": AdaMixerStage(cfg), "strides": strides}

    def prepare(self, features: list[Tensor]) -> GroupedPyramid:
        """Cut the channels of all levels into groups, in float32."""
        with torch.autocast(features[0].device.type, enabled=False):
            levels = [at_least_float32(x) for x in features]
            return GroupedPyramid.from_levels(levels, self.strides, self.groups)

    def _run_stage(
        self, stage: nn.Module, pyramid: GroupedPyramid, boxes: Tensor, states: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return stage(pyramid, boxes, states)
