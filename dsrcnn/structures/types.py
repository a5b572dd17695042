"""Named tuples that the parts of a detector pass to each other.

Notation, throughout the package: ``B`` images, ``P`` proposals, ``M`` ground truths (padded), ``C``
classes, ``D`` channels, ``L`` levels, ``S`` stages, ``Q`` prediction sets (one per stage; with SQR
one per stage and group). Boxes are xyxy in pixels of the network input, in float32.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


class Proposals(NamedTuple):
    """Input of the cascade: a box and a feature per proposal.

    Attributes:
        boxes: (B, P, 4) xyxy in pixels.
        features: (B, P, D).
    """

    boxes: Tensor
    features: Tensor


class Predictions(NamedTuple):
    """Predictions of all stages of a cascade, or of parallel decoders.

    Attributes:
        logits: (Q, B, P, C) raw class scores; C + 1 entries with softmax classification.
        boxes: (Q, B, P, 4) xyxy in pixels.
        stage: (Q,) int64, 0-based stage of each prediction set.
        mask: (B, P) bool, False for padding, which is never assigned; None without padding.
        candidates: in training, predictions (1, B, N, .) that the proposals were selected from;
            None where they were not.
    """

    logits: Tensor
    boxes: Tensor
    stage: Tensor
    mask: Tensor | None = None
    candidates: "Predictions | None" = None

    def of_sets(self, index: slice) -> "Predictions":
        """Select prediction sets."""
        return Predictions(self.logits[index], self.boxes[index], self.stage[index], self.mask)

    def of_proposals(self, index: slice) -> "Predictions":
        """Select proposals; the result has no mask."""
        return Predictions(self.logits[:, :, index], self.boxes[:, :, index], self.stage)


class Targets(NamedTuple):
    """Ground truth of a batch, padded to the image with the most objects.

    Attributes:
        boxes: (B, M, 4) xyxy in pixels, zero in the padding.
        labels: (B, M) int64 class ids, zero in the padding.
        mask: (B, M) bool, True for real ground truths.
        sizes: (B, 4) ``w, h, w, h`` of each image before padding, in pixels.
    """

    boxes: Tensor
    labels: Tensor
    mask: Tensor
    sizes: Tensor

    @classmethod
    def from_inputs(cls, batched_inputs: list[dict[str, Any]], sizes: Tensor) -> "Targets":
        """Collect the ground truth of model inputs.

        Counts are known on the host, so padding needs no synchronization.

        Args:
            batched_inputs: dictionaries with ``instances`` (``gt_boxes``, ``gt_classes``).
            sizes: (B, 4) on the device of the result.

        Raises:
            KeyError: if an input has no ``instances``.
        """
        instances = [x["instances"] for x in batched_inputs]
        counts = torch.tensor([len(x) for x in instances])
        mask = torch.arange(int(counts.max())) < counts.unsqueeze(1)
        boxes = pad_sequence([x.gt_boxes.tensor.float() for x in instances], batch_first=True)
        labels = pad_sequence([x.gt_classes.long() for x in instances], batch_first=True)
        boxes, labels, mask = (x.to(sizes.device, non_blocking=True) for x in (boxes, labels, mask))
        return cls(boxes.view(*mask.shape, 4), labels.view(mask.shape), mask, sizes)


class TermWeights(NamedTuple):
    """Weights of class, L1 and overlap term, in the losses or in the matching cost."""

    class_: float = 2.0
    l1: float = 5.0
    giou: float = 2.0
