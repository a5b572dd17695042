"""ROI heads that follow their proposals: Dynamic R-CNN (arXiv 2004.06002)."""

import math
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import ROI_HEADS_REGISTRY, StandardROIHeads
from detectron2.structures import Instances, pairwise_iou
from detectron2.utils import comm
from torch import Tensor

from ...config import check_model
from ..event_log import storage_in_turn
from .dynamic_matcher import DynamicMatcher
from .dynamic_output_layers import DynamicFastRCNNOutputLayers, regression_magnitudes
from .training_stats import DynamicTrainingStats

__all__ = ["DynamicROIHeads"]


@ROI_HEADS_REGISTRY.register()
class DynamicROIHeads(StandardROIHeads):
    """Detectron2's heads, whose foreground threshold and box loss follow the proposals.

    Architecture, parameters and inference are those of `StandardROIHeads`, masks and keypoints
    included.
    """

    @configurable
    def __init__(
        self,
        *,
        dynamic: DynamicTrainingStats,
        iou_rank: int = 75,
        beta_rank: int = 10,
        rank_by_image: bool = True,
        all_proposals: bool = False,
        count_gt: bool = True,
        log_period: int = 20,
        **kwargs: Any,
    ) -> None:
        """Set the ranks; all else is Detectron2's.

        Args:
            dynamic: the state.
            iou_rank: ``K_I``, per image.
            beta_rank: ``K_beta``, per image; multiplied by the images of this process.
            rank_by_image: see `DynamicMatcher.statistic`.
            all_proposals: rank the errors of all proposals, not of sampled foreground ones.
            count_gt: whether ground truths among the proposals count.
            log_period: iterations between entries in the log; 0 for none.
            **kwargs: of `StandardROIHeads`, with a `DynamicMatcher` and
                `DynamicFastRCNNOutputLayers`.
        """
        super().__init__(**kwargs)
        self.dynamic = dynamic
        self.iou_rank, self.beta_rank = iou_rank, beta_rank
        self.rank_by_image, self.all_proposals = rank_by_image, all_proposals
        self.count_gt, self.log_period = count_gt, log_period
        self._raw: list[Tensor] = []

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Any) -> dict[str, Any]:
        """Read `MODEL.DYNAMIC_RCNN` and what Detectron2 reads.

        Raises:
            ConfigError: if the config contradicts itself.
        """
        check_model(cfg)
        arguments: dict[str, Any] = super().from_config(cfg, input_shape)
        node = cfg.MODEL.DYNAMIC_RCNN
        shape = arguments["box_head"].output_shape
        arguments["box_predictor"] = DynamicFastRCNNOutputLayers(cfg, shape)
        arguments["proposal_matcher"] = DynamicMatcher(
            node.WARMUP_IOU if node.IOU_ENABLED else cfg.MODEL.ROI_HEADS.IOU_THRESHOLDS[0],
            dynamic=node.IOU_ENABLED,
            skip_last=not node.COUNT_GT and cfg.MODEL.ROI_HEADS.PROPOSAL_APPEND_GT,
        )
        arguments["dynamic"] = DynamicTrainingStats(
            # One entry for every part of a batch.
            window=node.ITERATION_COUNT * _parts_of_a_batch(cfg.SOLVER),
            warmup_iou=node.WARMUP_IOU,
            warmup_beta=node.WARMUP_BETA,
            max_iou=node.MAX_IOU,
            eps=node.EPS,
            sync=node.SYNC,
        )
        return {
            **arguments,
            "iou_rank": node.KI,
            "beta_rank": node.KE,
            "rank_by_image": node.IOU_RANK == "image",
            "all_proposals": node.BETA_SOURCE == "all",
            "count_gt": node.COUNT_GT,
            "log_period": node.LOG_PERIOD,
        }

    def forward(
        self,
        images: Any,
        features: dict[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> Any:
        """As Detectron2's; in training the statistics of the iteration are recorded."""
        if not self.training:
            return super().forward(images, features, proposals, targets)
        self._raw.clear()
        # Copies: the numbers may be renewed before the gradient is computed.
        self.proposal_matcher.begin(self.dynamic.iou_thresh.clone())
        self.box_predictor.begin(self.dynamic.beta.clone())
        result = super().forward(images, features, proposals, targets)
        if torch.is_grad_enabled():  # not while norms are being estimated
            self._record(len(proposals))
        return result

    def _record(self, images: int) -> None:
        iou = self.proposal_matcher.statistic(self.iou_rank, by_image=self.rank_by_image)
        if self.all_proposals:
            raw = torch.cat(self._raw) if self._raw else torch.zeros(0)
            rank = min(self.beta_rank * images, len(raw))
            error = raw.kthvalue(rank).values if rank else torch.tensor(torch.nan)
        else:
            rank = self.beta_rank * images
            error = self.box_predictor.statistic(rank, skip_exact=not self.count_gt)
        # Before the numbers are renewed: those that this iteration used.
        self._log(iou, error)
        self.dynamic.record(iou, error)

    @torch.no_grad()
    def label_and_sample_proposals(
        self, proposals: list[Instances], targets: list[Instances]
    ) -> list[Instances]:
        """As Detectron2's; measures the errors of all proposals first if they are wanted."""
        if self.all_proposals:
            self._raw = [
                self._errors_of(*pair)
                for pair in zip(proposals, targets, strict=True)
                if len(pair[1])
            ]
        sampled: list[Instances] = super().label_and_sample_proposals(proposals, targets)
        return sampled

    def _errors_of(self, proposals: Instances, targets: Instances) -> Tensor:
        """Of an image's proposals from their best object, and of its ground truths: none."""
        boxes, objects = proposals.proposal_boxes, targets.gt_boxes
        best = pairwise_iou(objects, boxes).argmax(dim=0) if len(boxes) else []
        transform = self.box_predictor.box2box_transform
        errors = regression_magnitudes(transform, boxes.tensor, objects.tensor[best])
        exact = len(objects) if self.proposal_append_gt and self.count_gt else 0
        return torch.cat([errors, errors.new_zeros(exact)])

    def _log(self, iou: Tensor, error: Tensor) -> None:
        storage = storage_in_turn(self.log_period)
        if storage is None:
            return
        values = {"iou_stat": iou, "err_stat": error}
        if self.proposal_matcher.dynamic:
            values["iou_thresh"] = self.dynamic.iou_thresh
        if self.box_predictor.dynamic:
            values["beta"] = self.dynamic.beta
        device = self.dynamic.beta.device
        numbers = torch.stack([v.float().to(device) for v in values.values()]).tolist()
        scalars = {f"dynamic_rcnn/{k}": v for k, v in zip(values, numbers, strict=True)}
        # NaN, where there was nothing to measure, would not be JSON.
        finite = {k: v for k, v in scalars.items() if v == v}
        storage.put_scalars(smoothing_hint=False, **finite)


def _parts_of_a_batch(solver: CfgNode) -> int:
    """In how many parts a process sees its share of a batch, as the training loop cuts it."""
    own = max(solver.IMS_PER_BATCH // comm.get_world_size(), 1)
    return math.ceil(own / math.ceil(own / solver.ACCUMULATE))
