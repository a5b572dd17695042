"""Named tuples that the parts of a detector pass to each other.

Notation, throughout the package: ``B`` images, ``P`` proposals, ``M`` ground truths (padded), ``C``
classes, ``D`` channels, ``L`` levels, ``S`` stages, ``Q`` prediction sets (``S``, or more with
SQR). Boxes are xyxy in pixels of the network input, float32 also under autocast.
"""

from typing import NamedTuple

from torch import Tensor

__all__ = ["Predictions", "Proposals", "Targets", "TermWeights"]


class Proposals(NamedTuple):
    """Input of the cascade: a box and a feature per proposal.

    Attributes:
        boxes: (B, P, 4) xyxy in pixels.
        features: (B, P, D).
    """

    boxes: Tensor
    features: Tensor


class Predictions(NamedTuple):
    """Per-stage predictions of the cascade.

    Attributes:
        logits: (Q, B, P, C) raw class scores; C + 1 entries with softmax classification.
        boxes: (Q, B, P, 4) xyxy in pixels.
        stage: (Q,) int64, 0-based stage of each prediction set.
        mask: (B, P) bool, False for padded proposals; None without padding.
    """

    logits: Tensor
    boxes: Tensor
    stage: Tensor
    mask: Tensor | None = None

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


class TermWeights(NamedTuple):
    """Weights of class, L1 and overlap term, in the losses or in the matching cost."""

    class_: float = 2.0
    l1: float = 5.0
    giou: float = 2.0
