"""Set losses over a dense assignment (Sparse R-CNN section 3.4).

Letters: ``Q`` prediction sets, ``B`` images, ``P`` proposals, ``M`` ground truths, ``C`` classes,
``S`` stages.
"""

from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from ...structures import Predictions, Targets, TermWeights, at_least_float32
from ...utils.distributed import mean_over_processes
from .box_losses import box_losses
from .class_losses import cross_entropy_losses, focal_losses

__all__ = ["LossCounts", "SetCriterion"]


class LossCounts(NamedTuple):
    """What losses are divided by.

    Attributes:
        learners: positives of every set (Q,), or ground truths (), see `SetCriterion`.
        class_weight: (Q,) sum of the class weights of all proposals, with softmax only.
    """

    learners: Tensor
    class_weight: Tensor | None = None


class SetCriterion(nn.Module):
    """Class, L1 and overlap loss of every stage, given who learns what."""

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
        reduction: str = "sum",
    ) -> None:
        """Set the losses.

        Args:
            num_classes: ``C``.
            num_stages: ``S``.
            weights: factor of each loss.
            deep_supervision: whether predictions of all stages come, or of the last one only.
            focal: focal classification; False for softmax with a background class.
            alpha: focal balance.
            gamma: focal exponent.
            no_object_weight: weight of the background class with softmax.
            normalizer: "gt" divides by the number of ground truths, as Sparse R-CNN does;
                "positives" by the number of proposals of the set that learn an object, for
                one-to-many assignments. Both are the same where every ground truth has one
                proposal. The softmax class loss uses neither: it is a weighted mean.
            overlap: which of `pairwise_overlaps` is learned; its loss has its name.
            reduction: over the prediction sets of a stage, "sum" or "mean"; there is one of each
                unless proposals are recollected (SQR).
        """
        super().__init__()
        self.num_classes = num_classes
        self.num_stages = num_stages
        self.weights = weights
        self.first_stage = 0 if deep_supervision else num_stages - 1
        self.focal = focal
        self.alpha = alpha
        self.gamma = gamma
        self.normalizer = normalizer
        self.overlap = overlap
        self.reduction = reduction
        if not focal:  # only then a part of official checkpoints
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
            "overlap": node.OVERLAP.LOSS,
            "reduction": node.SQR.REDUCTION,
        }

    @property
    def counts_targets_only(self) -> bool:
        """Whether `count` can do without predictions and assignment."""
        return self.focal and self.normalizer == "gt"

    def count(self, targets: Targets, assignment: Tensor | None = None) -> LossCounts:
        """What this batch of this process adds to the divisors of the losses.

        Args:
            targets: ground truth of the batch.
            assignment: (Q, B, P); None where `counts_targets_only`.
        """
        dtype = targets.sizes.dtype
        if assignment is None:
            return LossCounts(targets.mask.sum().to(dtype))
        positive = assignment >= 0
        counts = positive.sum(dim=(1, 2)) if self.normalizer == "positives" else targets.mask.sum()
        class_weight = None
        if not self.focal:
            classes, _ = self._gather(targets, assignment, positive)
            class_weight = self.empty_weight[classes].sum(dim=(1, 2))
        return LossCounts(counts.to(dtype), class_weight)

    def normalizers(self, parts: list[LossCounts]) -> LossCounts:
        """Divisors for a batch that was counted in parts: sums, averaged over processes.

        One collective for all sets. They stay tensors: reading them would stall the device. The
        class weights remain those of the process, as the softmax loss is a mean of its own.
        """
        learners = torch.stack([p.learners for p in parts]).sum(dim=0)
        weights = [p.class_weight for p in parts if p.class_weight is not None]
        total = torch.stack(weights).sum(dim=0) if weights else None
        return LossCounts(mean_over_processes(learners).clamp(min=1), total)

    def forward(
        self,
        predictions: Predictions,
        targets: Targets,
        assignment: Tensor,
        normalizers: LossCounts | None = None,
    ) -> dict[str, Tensor]:
        """Weighted losses of every stage.

        Args:
            predictions: of all stages.
            targets: ground truth of the batch.
            assignment: (Q, B, P) int64, -1 = background.
            normalizers: of a larger batch that this is a part of; None: this is the batch.

        Returns:
            ``loss_ce``, ``loss_bbox`` and ``loss_giou`` (or of another overlap) of the last stage,
            those of stage s < S - 1 with the suffix ``_s``. An image without ground truth
            contributes to ``loss_ce`` only; all losses stay connected to the graph.
        """
        positive = assignment >= 0
        classes, wanted = self._gather(targets, assignment, positive)
        # Never in half precision: the sums run over all proposals and classes.
        logits, boxes = (at_least_float32(x) for x in predictions[:2])
        sizes = targets.sizes.to(boxes.dtype)
        l1, overlap = box_losses(boxes, wanted, positive, sizes, self.overlap)
        if normalizers is None:
            normalizers = self.normalizers([self.count(targets, assignment)])
        normalizer = normalizers.learners
        if self.focal:
            ce = focal_losses(logits, classes, alpha=self.alpha, gamma=self.gamma) / normalizer
        else:
            ce = cross_entropy_losses(logits, classes, self.empty_weight.to(logits.dtype))
            assert normalizers.class_weight is not None  # `count` gives it with softmax
            ce = ce / normalizers.class_weight
        per_set = {
            "loss_ce": self.weights.class_ * ce,
            "loss_bbox": self.weights.l1 * l1 / normalizer,
            f"loss_{self.overlap}": self.weights.giou * overlap / normalizer,
        }
        return self._by_stage(per_set, predictions.stage)

    def _gather(
        self, targets: Targets, assignment: Tensor, positive: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Class (Q, B, P) and box (Q, B, P, 4) that each proposal learns."""
        if targets.mask.shape[1] == 0:
            wanted = targets.boxes.new_zeros(*assignment.shape, 4)
            return torch.full_like(assignment, self.num_classes), wanted
        index = assignment.clamp(min=0)
        image = torch.arange(index.shape[1], device=index.device).view(1, -1, 1)
        labels = targets.labels[image, index]
        return labels.masked_fill(~positive, self.num_classes), targets.boxes[image, index]

    def _by_stage(self, per_set: dict[str, Tensor], stage: Tensor) -> dict[str, Tensor]:
        """Sum the sets of each stage and name the sums as the official code does."""
        losses = {}
        supervised = self.num_stages - self.first_stage
        place = stage - self.first_stage
        for name, values in per_set.items():
            empty = values.new_zeros(supervised)
            sums = empty.index_add(0, place, values)
            if self.reduction == "mean":
                sums = sums / empty.index_add(0, place, torch.ones_like(values))
            for offset, value in enumerate(sums.unbind()):
                index = self.first_stage + offset
                losses[name if index == self.num_stages - 1 else f"{name}_{index}"] = value
        return losses
