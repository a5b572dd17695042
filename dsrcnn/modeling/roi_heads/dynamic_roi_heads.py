"""ROI heads that follow their proposals: Dynamic R-CNN (arXiv 2004.06002)."""

import math
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import ROI_HEADS_REGISTRY, StandardROIHeads
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.structures import Instances, pairwise_iou
from detectron2.utils import comm
from torch import Tensor

from ...config import check_model
from ...utils.events import storage_in_turn
from .training_stats import DynamicTrainingStats

__all__ = [
    "DynamicFastRCNNOutputLayers",
    "DynamicMatcher",
    "DynamicROIHeads",
    "regression_magnitudes",
    "smooth_l1",
]


class DynamicMatcher(Matcher):
    """Detectron2's matcher with one threshold, that remembers how good the proposals were."""

    def __init__(self, threshold: float, *, dynamic: bool = True, skip_last: bool = False) -> None:
        """Set the threshold to begin with.

        Args:
            threshold: proposals of at least this IoU are foreground, all others background.
            dynamic: whether `begin` may change it.
            skip_last: leave ground truths, which stand behind the proposals, out of the statistic.
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
        """Match as the base class does; (M, N) IoUs of an image's objects with its proposals."""
        objects = len(match_quality_matrix)
        if objects:
            ious = match_quality_matrix[:, :-objects] if self.skip_last else match_quality_matrix
            self._best.append(ious.max(dim=0).values)
        matches, labels = super().__call__(match_quality_matrix)
        return matches, labels

    def statistic(self, rank: int, *, by_image: bool = True) -> Tensor:
        """The IoU of the proposal of this rank, () or NaN where there is no object.

        Args:
            rank: per image; where there are fewer proposals, the last one's.
            by_image: the mean over images of each one's; otherwise that of `rank` times the images
                among all of them.
        """
        best = [ious for ious in self._best if len(ious)]
        if not best:
            return torch.tensor(torch.nan)
        if not by_image:
            best, rank = [torch.cat(best)], rank * len(best)
        values = [ious.topk(min(rank, len(ious))).values[-1] for ious in best]
        return torch.stack(values).mean()


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
