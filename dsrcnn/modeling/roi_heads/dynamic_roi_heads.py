"""ROI heads of Dynamic R-CNN (arXiv 2004.06002), whose labels and loss follow the proposals."""

import math
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import ROI_HEADS_REGISTRY, StandardROIHeads
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.structures import Instances
from detectron2.utils import comm
from torch import Tensor

from ...config.validate import ChecksConfig, check_dynamic_rcnn
from ...utils.events import ScalarLog
from .training_stats import DynamicTrainingStats


class DynamicMatcher(Matcher):
    """Detectron2's matcher with one threshold; it keeps the IoUs of an iteration."""

    def __init__(self, threshold: float, *, dynamic: bool = True, skip_last: bool = False) -> None:
        """Set the initial threshold, the least IoU of foreground; if `dynamic`, `begin` changes it.

        `skip_last` excludes ground truths, which come after the proposals, from the statistic.
        """
        super().__init__([threshold], [0, 1], allow_low_quality_matches=False)
        self.dynamic = dynamic
        self.skip_last = skip_last
        self._best: list[Tensor] = []

    def begin(self, threshold: Tensor) -> None:
        """Begin an iteration with a threshold () on the device."""
        self._best.clear()
        if self.dynamic:
            self.thresholds[1] = threshold

    def __call__(self, match_quality_matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Match the proposals of an image by their IoUs (M, N) with the ground truths."""
        targets = len(match_quality_matrix)
        if targets:
            ious = match_quality_matrix[:, :-targets] if self.skip_last else match_quality_matrix
            self._best.append(ious.max(dim=0).values)
        matches, labels = super().__call__(match_quality_matrix)
        return matches, labels

    def statistic(self, rank: int) -> Tensor:
        """Mean over images of the `rank`-th largest IoU, or the smallest one if there are fewer.

        NaN without any ground truth.
        """
        best = [ious for ious in self._best if len(ious)]
        if not best:
            return torch.tensor(torch.nan)
        values = [ious.topk(min(rank, len(ious))).values[-1] for ious in best]
        return torch.stack(values).mean()


def smooth_l1(residuals: Tensor, beta: Tensor) -> Tensor:
    """Sum of ``x^2 / (2 beta)`` below `beta` and ``|x| - beta / 2`` above (section 4.2).

    Args:
        residuals: of any shape.
        beta: (); clamped to 1e-5, very nearly L1 but with finite gradients.
    """
    beta = beta.clamp(min=1e-5)
    size = residuals.abs()
    return torch.where(size < beta, 0.5 * size**2 / beta, size - 0.5 * beta).sum()


def regression_magnitudes(transform: Any, boxes: Tensor, targets: Tensor) -> Tensor:
    """Mean of ``|dx|`` and ``|dy|`` from boxes (N, 4) to targets (N, 4), (N,).

    In the units of the box coder; sizes and the predicted deltas have no part in it.
    """
    deltas: Tensor = transform.get_deltas(boxes.float(), targets.float())
    return deltas[:, :2].abs().mean(dim=1)


class DynamicFastRCNNOutputLayers(FastRCNNOutputLayers):
    """Detectron2's output layers with Dynamic SmoothL1; they keep the errors of an iteration."""

    @configurable
    def __init__(self, input_shape: Any, *, dynamic: bool = True, **kwargs: Any) -> None:
        """Set whether `begin` changes the loss; other arguments are Detectron2's."""
        super().__init__(input_shape, **kwargs)
        self.dynamic = dynamic
        self._beta: list[Tensor] = []  # in a list: a buffer would be saved twice
        self._magnitudes: Tensor | None = None

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Any) -> dict[str, Any]:
        """Read `MODEL.DYNAMIC_RCNN` and Detectron2's keys."""
        dynamic = cfg.MODEL.DYNAMIC_RCNN.BETA_ENABLED
        return {**super().from_config(cfg, input_shape), "dynamic": dynamic}

    def begin(self, beta: Tensor) -> None:
        """Begin an iteration with a transition point () on the device."""
        self._beta = [beta]
        self._magnitudes = None

    def losses(self, predictions: Any, proposals: list[Instances]) -> dict[str, Tensor]:
        """Compute Detectron2's losses, and keep the errors of foreground proposals."""
        self._magnitudes = None
        annotated = [p for p in proposals if p.has("gt_boxes")]
        if annotated:
            boxes = torch.cat([p.proposal_boxes.tensor for p in annotated])
            targets = torch.cat([p.gt_boxes.tensor for p in annotated])
            foreground = torch.cat([p.gt_classes for p in annotated]) < self.num_classes
            with torch.no_grad():
                errors = regression_magnitudes(self.box2box_transform, boxes, targets)
            self._magnitudes = errors[foreground]
        losses: dict[str, Tensor] = super().losses(predictions, proposals)
        return losses

    def statistic(self, rank: int, *, skip_exact: bool = False) -> Tensor:
        """The `rank`-th smallest error of the batch, or the largest one if there are fewer.

        `skip_exact` excludes proposals that are their ground truth. NaN without foreground.
        """
        errors = self._magnitudes
        if errors is not None and skip_exact:
            errors = errors[errors > 0]
        if errors is None or not len(errors):
            return torch.tensor(torch.nan)
        return errors.kthvalue(min(rank, len(errors))).values

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
        if deltas.shape[1] != 4:  # class-specific boxes
            by_class = deltas.view(len(deltas), self.num_classes, 4)
            index = torch.arange(len(deltas), device=deltas.device)
            deltas = by_class[index, gt_classes[foreground]]
        with torch.autocast(deltas.device.type, enabled=False):
            targets = self.box2box_transform.get_deltas(
                proposal_boxes[foreground].float(), gt_boxes[foreground].float()
            )
            return smooth_l1(deltas.float() - targets, self._beta[0]) / max(len(gt_classes), 1)


@ROI_HEADS_REGISTRY.register()
class DynamicROIHeads(StandardROIHeads, ChecksConfig):
    """Detectron2's heads with a foreground threshold and a box loss that follow the proposals.

    Architecture, parameters and inference are those of `StandardROIHeads`, masks and keypoints
    included.
    """

    @configurable
    def __init__(
        self,
        *,
        dynamic: DynamicTrainingStats,
        iou_rank: int,
        beta_rank: int,
        count_gt: bool,
        log: ScalarLog,
        **kwargs: Any,
    ) -> None:
        """Set the ranks.

        Args:
            dynamic: the state.
            iou_rank: ``K_I``, per image.
            beta_rank: ``K_beta``, per image; multiplied by the images of this process.
            count_gt: whether ground truths among the proposals count.
            log: for the statistics and settings (``dynamic_rcnn/*``).
            **kwargs: of `StandardROIHeads`, with a `DynamicMatcher` and
                `DynamicFastRCNNOutputLayers`.
        """
        super().__init__(**kwargs)
        self.dynamic = dynamic
        self.iou_rank, self.beta_rank, self.count_gt = iou_rank, beta_rank, count_gt
        self.log = log

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Any) -> dict[str, Any]:
        """Read `MODEL.DYNAMIC_RCNN` and Detectron2's keys.

        Raises:
            ConfigError: if the config contradicts itself.
        """
        cls.check_config(cfg)
        arguments: dict[str, Any] = super().from_config(cfg, input_shape)
        node, solver = cfg.MODEL.DYNAMIC_RCNN, cfg.SOLVER
        shape = arguments["box_head"].output_shape
        arguments["box_predictor"] = DynamicFastRCNNOutputLayers(cfg, shape)
        arguments["proposal_matcher"] = DynamicMatcher(
            node.WARMUP_IOU if node.IOU_ENABLED else cfg.MODEL.ROI_HEADS.IOU_THRESHOLDS[0],
            dynamic=node.IOU_ENABLED,
            skip_last=not node.COUNT_GT and cfg.MODEL.ROI_HEADS.PROPOSAL_APPEND_GT,
        )
        # A window has an entry for every part that the training loop cuts a batch into.
        images = max(solver.IMS_PER_BATCH // comm.get_world_size(), 1)
        parts = math.ceil(images / math.ceil(images / solver.ACCUMULATE))
        arguments["dynamic"] = DynamicTrainingStats(
            window=node.ITERATION_COUNT * parts,
            warmup_iou=node.WARMUP_IOU,
            warmup_beta=node.WARMUP_BETA,
            max_iou=node.MAX_IOU,
        )
        return {
            **arguments,
            "iou_rank": node.KI,
            "beta_rank": node.KE,
            "count_gt": node.COUNT_GT,
            "log": ScalarLog(cfg.LOG.PERIOD),
        }

    @classmethod
    def check_config(cls, cfg: CfgNode) -> None:
        """Check ``MODEL.DYNAMIC_RCNN``, see `check_dynamic_rcnn`."""
        check_dynamic_rcnn(cfg)

    def forward(
        self,
        images: Any,
        features: dict[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> Any:
        """Run Detectron2's heads, and record the statistics of a training iteration."""
        if not self.training:
            return super().forward(images, features, proposals, targets)
        # Copies: they may be updated before the gradient is computed.
        self.proposal_matcher.begin(self.dynamic.iou_thresh.clone())
        self.box_predictor.begin(self.dynamic.beta.clone())
        result = super().forward(images, features, proposals, targets)
        if torch.is_grad_enabled():  # without gradients it is no training iteration
            self._record(len(proposals))
        return result

    def _record(self, images: int) -> None:
        iou = self.proposal_matcher.statistic(self.iou_rank)
        rank = self.beta_rank * images
        error = self.box_predictor.statistic(rank, skip_exact=not self.count_gt)
        if self.log.is_due():  # before the update: the settings that this iteration used
            scalars = {"iou_stat": iou, "err_stat": error}
            if self.proposal_matcher.dynamic:
                scalars["iou_thresh"] = self.dynamic.iou_thresh
            if self.box_predictor.dynamic:
                scalars["beta"] = self.dynamic.beta
            device = self.dynamic.beta.device  # NaN statistics are on the host
            self.log.write("dynamic_rcnn", {k: v.to(device) for k, v in scalars.items()})
        self.dynamic.record(iou, error)
