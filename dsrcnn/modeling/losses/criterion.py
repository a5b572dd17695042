"""Set losses over a dense assignment (Sparse R-CNN section 3.4)."""

from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from ...structures import Predictions, Targets, TermWeights, at_least_float32
from ...utils.compilation import compile_mode, in_region
from ...utils.distributed import reduce_mean
from ...utils.events import ScalarLog
from ...utils.training import iteration_ends
from .box_losses import box_losses
from .class_losses import cross_entropy_losses, focal_losses, quality_focal_losses


class LossNormalizers(NamedTuple):
    """Divisors of the losses.

    Attributes:
        num_boxes: number of positives of every set (Q,), or of ground truths (), see
            `SetCriterion`.
        class_weight_sum: (Q,) over all proposals, with softmax only.
    """

    num_boxes: Tensor
    class_weight_sum: Tensor | None = None


class SetCriterion(nn.Module):
    """Class, L1 and overlap loss of every stage, given an assignment."""

    empty_weight: Tensor

    @configurable
    def __init__(
        self,
        *,
        num_classes: int,
        num_stages: int,
        weights: TermWeights,
        deep_supervision: bool = True,
        focal: bool = True,
        alpha: float = 0.25,
        gamma: float = 2.0,
        no_object_weight: float = 0.1,
        normalizer: str = "gt",
        overlap: str = "giou",
        class_target: str = "label",
        l1_of_centers: bool = False,
        log: ScalarLog | None = None,
        compile_mode: str = "",
    ) -> None:
        """Initialize the criterion.

        Args:
            num_classes: ``C``.
            num_stages: ``S``.
            weights: factor of each loss.
            deep_supervision: whether predictions come from all stages, or from the last one only.
            focal: focal classification; False for softmax with a background class.
            alpha: focal balance.
            gamma: focal exponent.
            no_object_weight: weight of the background class with softmax.
            normalizer: "gt" divides by the number of ground truths, as Sparse R-CNN does;
                "positives" by the number of positive proposals of the set, for one-to-many
                assignment. Both are equal if every ground truth has one proposal. The softmax class
                loss uses neither: it is a weighted mean.
            overlap: see `pairwise_overlaps`; the loss is named after it.
            class_target: "label", 1 for every positive; or "iou", the IoU of its box with its
                ground truth, without gradient (`quality_focal_losses`).
            l1_of_centers: see `box_losses`.
            log: with recollection (SQR), for the losses of the plain cascade (``plain/*``).
            compile_mode: of ``torch.compile`` for `set_losses`; empty: not compiled.
        """
        super().__init__()
        self.num_classes, self.num_stages = num_classes, num_stages
        self.weights = weights
        self.first_stage = 0 if deep_supervision else num_stages - 1
        self.focal, self.alpha, self.gamma = focal, alpha, gamma
        self.normalizer, self.overlap = normalizer, overlap
        self.class_target = class_target
        self.l1_of_centers = l1_of_centers
        self.log = log or ScalarLog(0)
        self.compile_mode = compile_mode
        self._plain_sums: dict[str, Tensor] = {}  # of the parts of this iteration so far
        if not focal:  # only then part of official checkpoints
            class_weights = torch.ones(num_classes + 1)
            class_weights[-1] = no_object_weight
            self.register_buffer("empty_weight", class_weights)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read `MODEL.SparseRCNN`."""
        node = cfg.MODEL.SparseRCNN
        return {
            "num_classes": node.NUM_CLASSES,
            "num_stages": node.NUM_HEADS,
            "weights": TermWeights(node.CLASS_WEIGHT, node.L1_WEIGHT, node.GIOU_WEIGHT),
            "deep_supervision": node.DEEP_SUPERVISION,
            "focal": node.USE_FOCAL,
            "alpha": node.ALPHA,
            "gamma": node.GAMMA,
            "no_object_weight": node.NO_OBJECT_WEIGHT,
            "normalizer": node.DLA.NORMALIZER if node.DLA.ENABLED else "gt",
            "overlap": node.OVERLAP,
            "log": ScalarLog(cfg.LOG.PERIOD if node.SQR.ENABLED else 0),
            "compile_mode": compile_mode(cfg),
        }

    @property
    def counts_targets_only(self) -> bool:
        """Whether `count` needs neither predictions nor an assignment."""
        return self.focal and self.normalizer == "gt"

    def count(self, targets: Targets, assignment: Tensor | None = None) -> LossNormalizers:
        """Count what a batch of this process adds to the normalizers.

        The assignment (Q, B, P) is not needed if `counts_targets_only`.
        """
        dtype = targets.sizes.dtype
        if assignment is None:
            return LossNormalizers(targets.mask.sum().to(dtype))
        positive = assignment >= 0
        counts = positive.sum(dim=(1, 2)) if self.normalizer == "positives" else targets.mask.sum()
        class_weight = None
        if not self.focal:
            classes, _ = self._gather(targets, assignment, positive)
            class_weight = self.empty_weight[classes].sum(dim=(1, 2))
        return LossNormalizers(counts.to(dtype), class_weight)

    def normalizers(self, counts: list[LossNormalizers]) -> LossNormalizers:
        """Sum the counts of all parts of a batch and average them over processes.

        There is one collective for all sets. The result stays on the device, since reading it would
        stall. Class weights stay those of the process: the softmax loss is its own mean.
        """
        positives = torch.stack([c.num_boxes for c in counts]).sum(dim=0)
        weights = [c.class_weight_sum for c in counts if c.class_weight_sum is not None]
        # Positive also if only background, of weight 0, is there to be learned.
        least = torch.finfo(torch.float32).eps
        total = torch.stack(weights).sum(dim=0).clamp(min=least) if weights else None
        return LossNormalizers(reduce_mean(positives).clamp(min=1), total)

    def forward(
        self,
        predictions: Predictions,
        targets: Targets,
        assignment: Tensor,
        normalizers: LossNormalizers | None = None,
    ) -> dict[str, Tensor]:
        """Compute the weighted losses of every stage.

        Args:
            predictions: of all stages.
            targets: ground truth of the batch.
            assignment: (Q, B, P) int64, -1 for background.
            normalizers: of the larger batch this is a part of; None for those of this batch.

        Returns:
            ``loss_ce``, ``loss_bbox`` and ``loss_giou`` (or of another overlap) of the last stage,
            those of stage s < S - 1 with the suffix ``_s``. An image without ground truth
            contributes to ``loss_ce`` only; all losses stay connected to the graph.
        """
        if normalizers is None:
            normalizers = self.normalizers([self.count(targets, assignment)])
        losses_of_sets = in_region(type(self).set_losses, self.compile_mode)
        per_set = losses_of_sets(self, predictions, targets, assignment, normalizers)
        if self.log.is_due():
            self._log_plain(per_set, predictions.stage)
        return self._by_stage(per_set, predictions.stage)

    def set_losses(
        self,
        predictions: Predictions,
        targets: Targets,
        assignment: Tensor,
        normalizers: LossNormalizers,
    ) -> dict[str, Tensor]:
        """Compute the weighted losses (Q,) of every prediction set by name; see `forward`."""
        positive = assignment >= 0
        classes, boxes = self._gather(targets, assignment, positive)
        # Never in half precision: the sums run over all proposals and classes.
        logits, predicted = (at_least_float32(x) for x in predictions[:2])
        sizes = targets.sizes.to(predicted.dtype)
        l1, overlap, iou = box_losses(
            predicted, boxes, positive, sizes, self.overlap, l1_of_centers=self.l1_of_centers
        )
        if self.focal:
            settings = {"alpha": self.alpha, "gamma": self.gamma}
            if self.class_target == "iou":
                ce = quality_focal_losses(logits, classes, iou.detach(), **settings)
            else:
                ce = focal_losses(logits, classes, **settings)
            ce = ce / normalizers.num_boxes
        else:
            ce = cross_entropy_losses(logits, classes, self.empty_weight.to(logits.dtype))
            assert normalizers.class_weight_sum is not None  # `count` sets it with softmax
            ce = ce / normalizers.class_weight_sum
        return {
            "loss_ce": self.weights.class_ * ce,
            "loss_bbox": self.weights.l1 * l1 / normalizers.num_boxes,
            f"loss_{self.overlap}": self.weights.giou * overlap / normalizers.num_boxes,
        }

    def _gather(
        self, targets: Targets, assignment: Tensor, positive: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Target class (Q, B, P) and box (Q, B, P, 4) of each proposal."""
        if targets.mask.shape[1] == 0:
            boxes = targets.boxes.new_zeros(*assignment.shape, 4)
            return torch.full_like(assignment, self.num_classes), boxes
        index = assignment.clamp(min=0)
        image = torch.arange(index.shape[1], device=index.device).view(1, -1, 1)
        labels = targets.labels[image, index]
        return labels.masked_fill(~positive, self.num_classes), targets.boxes[image, index]

    def _by_stage(self, per_set: dict[str, Tensor], stage: Tensor) -> dict[str, Tensor]:
        """Sum the sets of each stage and name the sums as the official code does."""
        losses = {}
        supervised = self.num_stages - self.first_stage
        for name, values in per_set.items():
            sums = values.new_zeros(supervised).index_add(0, stage - self.first_stage, values)
            for offset, value in enumerate(sums.unbind()):
                index = self.first_stage + offset
                losses[name if index == self.num_stages - 1 else f"{name}_{index}"] = value
        return losses

    def _log_plain(self, per_set: dict[str, Tensor], stage: Tensor) -> None:
        """Log the losses of the plain cascade, the last set of every stage.

        They are comparable with a run without SQR; parts of an iteration are added up.
        """
        stages = stage.tolist()
        last = [i for i, number in enumerate(stages) if number not in stages[i + 1 :]]
        plain = {name: values.detach()[last] for name, values in per_set.items()}
        for name, value in self._by_stage(plain, stage[last]).items():
            self._plain_sums[name] = self._plain_sums.get(name, 0.0) + value
        if not iteration_ends():
            return
        means = reduce_mean(torch.stack(list(self._plain_sums.values())))
        scalars = dict(zip(self._plain_sums, means.unbind(), strict=True))
        self.log.write("plain", {**scalars, "total_loss": means.sum()})
        self._plain_sums = {}
