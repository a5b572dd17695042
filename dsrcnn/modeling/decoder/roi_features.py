"""RoI features of the cascade: the pyramid is laid out once, every stage pools from it."""

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from ...errors import ConfigError
from ...layers.roi_align import FeatureTable, pool_rois
from ...structures import at_least_float32

__all__ = ["RoIFeatures"]


class RoIFeatures(nn.Module):
    """Pools a fixed grid of features for every box; has no parameters."""

    @configurable
    def __init__(
        self,
        *,
        strides: tuple[int, ...],
        resolution: int = 7,
        samples: int = 2,
        aligned: bool = True,
    ) -> None:
        """Set the grid.

        Args:
            strides: of the pyramid levels, finest first, each twice the one before.
            resolution: cells per side of a RoI.
            samples: sampling points per cell and side.
            aligned: see `pool_rois`.

        Raises:
            ConfigError: if `samples` is not positive.
        """
        super().__init__()
        if samples < 1:
            raise ConfigError(
                f"MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO is {samples}; write a number of at "
                "least 1 (Sparse R-CNN uses 2)."
            )
        self.strides = strides
        self.resolution = resolution
        self.samples = samples
        self.aligned = aligned

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        """Read `MODEL.ROI_BOX_HEAD`; strides follow the names ``p2`` ... of the features."""
        node = cfg.MODEL.ROI_BOX_HEAD
        if node.POOLER_TYPE != "ROIAlignV2":
            raise ConfigError(
                f"MODEL.ROI_BOX_HEAD.POOLER_TYPE is {node.POOLER_TYPE!r}; the cascade pools with "
                "'ROIAlignV2' (aligned RoIAlign). Write MODEL.ROI_BOX_HEAD.POOLER_TYPE ROIAlignV2."
            )
        return {
            "strides": tuple(stride_of(name) for name in cfg.MODEL.ROI_HEADS.IN_FEATURES),
            "resolution": node.POOLER_RESOLUTION,
            "samples": node.POOLER_SAMPLING_RATIO,
        }

    def extra_repr(self) -> str:
        """Settings for the printed model."""
        return f"strides={self.strides}, resolution={self.resolution}, samples={self.samples}"

    def prepare(self, features: list[Tensor]) -> FeatureTable:
        """Lay out the pyramid levels (B, D, H_l, W_l) once for all stages, in float32."""
        with torch.autocast(features[0].device.type, enabled=False):
            return FeatureTable.from_levels([at_least_float32(f) for f in features], self.strides)

    def forward(self, table: FeatureTable, boxes: Tensor) -> Tensor:
        """Pool boxes (B, R, 4) into (B * R, K * K, D); no gradient reaches the boxes."""
        return pool_rois(
            table, boxes, cells=self.resolution, samples=self.samples, aligned=self.aligned
        )


def stride_of(name: str) -> int:
    """Stride of a pyramid level by its name: ``p3`` has 8."""
    if not (name.startswith("p") and name[1:].isdigit()):
        raise ConfigError(
            f"MODEL.ROI_HEADS.IN_FEATURES names {name!r}; the cascade pools from pyramid levels. "
            "Write [p2, p3, p4, p5]."
        )
    return 2 ** int(name[1:])
