"""Named tuples that the parts of a detector hand to each other.

Letters: ``B`` images, ``P`` proposals, ``M`` ground truths (padded), ``C`` classes, ``D`` channels,
``Q`` prediction sets. Boxes are xyxy in pixels of the network input, float32 also under autocast.
"""

from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["Predictions", "Proposals", "Targets", "TermWeights"]


class Proposals(NamedTuple):
    """What the cascade starts from: a box and a feature per proposal.

    Attributes:
        boxes: (B, P, 4) xyxy in pixels.
        features: (B, P, D).
    """

    boxes: Tensor
    features: Tensor


class Predictions(NamedTuple):
    """What a cascade says.

    Attributes:
        logits: (Q, B, P, C) raw class scores; C + 1 entries with softmax classification.
        boxes: (Q, B, P, 4) xyxy in pixels.
        stage: (Q,) int64, the 0-based stage each prediction set comes from.
        mask: (B, P) bool, False for proposals that are padding; None where there are none.
    """

    logits: Tensor
    boxes: Tensor
    stage: Tensor
    mask: Tensor | None = None

    def of_sets(self, index: Any) -> "Predictions":
        """Some of the prediction sets, by what indexes a tensor."""
        return self._replace(
            logits=self.logits[index], boxes=self.boxes[index], stage=self.stage[index]
        )

    def of_proposals(self, index: slice) -> "Predictions":
        """Some of the proposals, without a mask."""
        return Predictions(self.logits[:, :, index], self.boxes[:, :, index], self.stage)


class Targets(NamedTuple):
    """The ground truth of a batch, padded to the image with the most objects.

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
    """How much class, L1 and generalised IoU count, in the losses or in the matching cost."""

    class_: float = 2.0
    l1: float = 5.0
    giou: float = 2.0
