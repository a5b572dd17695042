"""Dynamic SmoothL1 of Dynamic R-CNN: a box loss whose transition point follows the proposals."""

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.structures import Instances
from torch import Tensor

__all__ = ["DynamicFastRCNNOutputLayers", "regression_magnitudes", "smooth_l1"]


def smooth_l1(residuals: Tensor, beta: Tensor) -> Tensor:
    """Sum of ``x^2 / (2 beta)`` below `beta` and ``|x| - beta / 2`` above (section 4.2).

    Args:
        residuals: of any shape.
        beta: (); below 1e-5 the loss is that of 1e-5, very nearly L1, with finite gradients.
    """
    beta = beta.clamp(min=1e-5)
    size = residuals.abs()
    return torch.where(size < beta, 0.5 * size**2 / beta, size - 0.5 * beta).sum()


def regression_magnitudes(transform: Any, boxes: Tensor, wanted: Tensor) -> Tensor:
    """How far boxes (N, 4) are from what they should be (N, 4): mean of |dx| and |dy|, (N,).

    In the units of the box coder; sizes and the network's prediction have no part in it.
    """
    deltas: Tensor = transform.get_deltas(boxes.float(), wanted.float())
    return deltas[:, :2].abs().mean(dim=1)


class DynamicFastRCNNOutputLayers(FastRCNNOutputLayers):
    """Detectron2's output layers with Dynamic SmoothL1."""

    @configurable
    def __init__(self, input_shape: Any, *, dynamic: bool = True, **kwargs: Any) -> None:
        """Set whether `begin` changes the loss; all else is Detectron2's."""
        super().__init__(input_shape, **kwargs)
        self.dynamic = dynamic
        self._beta: list[Tensor] = []  # in a list: a buffer would be saved twice
        self._magnitudes: Tensor | None = None

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Any) -> dict[str, Any]:
        """Read `MODEL.DYNAMIC_RCNN` and what Detectron2 reads."""
        arguments: dict[str, Any] = super().from_config(cfg, input_shape)
        arguments["dynamic"] = cfg.MODEL.DYNAMIC_RCNN.BETA_ENABLED
        return arguments

    def begin(self, beta: Tensor) -> None:
        """Begin an iteration with a transition point () on the device."""
        self._beta = [beta]
        self._magnitudes = None

    def losses(self, predictions: Any, proposals: list[Instances]) -> dict[str, Tensor]:
        """As Detectron2's; remembers how far foreground proposals are from their objects."""
        with torch.no_grad():
            self._magnitudes = self._measured([p for p in proposals if p.has("gt_boxes")])
        losses: dict[str, Tensor] = super().losses(predictions, proposals)
        return losses

    def _measured(self, proposals: list[Instances]) -> Tensor | None:
        """Magnitudes of all foreground proposals of the batch; None where no image has objects."""
        if not proposals:
            return None
        boxes = torch.cat([p.proposal_boxes.tensor for p in proposals])
        wanted = torch.cat([p.gt_boxes.tensor for p in proposals])
        foreground = torch.cat([p.gt_classes for p in proposals]) < self.num_classes
        return regression_magnitudes(self.box2box_transform, boxes, wanted)[foreground]

    def statistic(self, rank: int, *, skip_exact: bool = False) -> Tensor:
        """The magnitude of this rank, smallest first, () or NaN without foreground.

        Args:
            rank: of the batch; where there are fewer, the last one.
            skip_exact: leave out proposals that are their ground truth.
        """
        found = self._magnitudes
        if found is not None and skip_exact:
            found = found[found > 0]
        if found is None or not len(found):
            return torch.tensor(torch.nan)
        return found.kthvalue(min(rank, len(found))).values

    def box_reg_loss(
        self,
        proposal_boxes: Tensor,
        gt_boxes: Tensor,
        pred_deltas: Tensor,
        gt_classes: Tensor,
        *_: Any,
    ) -> Tensor:
        """Dynamic SmoothL1 of foreground boxes, divided by all sampled ones; in float32."""
        if not (self.dynamic and self._beta):
            loss: Tensor = super().box_reg_loss(proposal_boxes, gt_boxes, pred_deltas, gt_classes)
            return loss
        foreground = ((gt_classes >= 0) & (gt_classes < self.num_classes)).nonzero()[:, 0]
        deltas = pred_deltas[foreground]
        if deltas.shape[1] != 4:  # one box for each class
            by_class = deltas.view(len(deltas), self.num_classes, 4)
            deltas = by_class[
                torch.arange(len(deltas), device=deltas.device), gt_classes[foreground]
            ]
        with torch.autocast(deltas.device.type, enabled=False):
            wanted = self.box2box_transform.get_deltas(
                proposal_boxes[foreground].float(), gt_boxes[foreground].float()
            )
            return smooth_l1(deltas.float() - wanted, self._beta[0]) / max(len(gt_classes), 1)
