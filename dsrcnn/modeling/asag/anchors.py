"""Nouns of ASAG: anchors, what they are made from, and objects to learn.

Letters: ``B`` images, ``A`` anchors per patch, ``m`` probed patches, ``N`` anchors of an image
(padded), ``R`` images or patches, ``M`` objects (padded).
"""

from typing import NamedTuple

from torch import Tensor

__all__ = ["Anchors", "FixedLevels", "Objects", "ProbedLevel", "ProbingRule"]


class ProbingRule(NamedTuple):
    """When anchors are looked at more closely, and which are given out.

    Attributes:
        low: anchors of at least this location score are worth a closer look,
        high: unless they are this good already.
        overlap: IoU of patches above which one of them is enough.
        output: smallest location score that is given out.
        least: anchors of an image, of the fixed levels, whatever their scores.
        most: anchors of an image.
        min_side: of an anchor in pixels; smaller ones have no score.
        max_patches: per image and level; 0 for no limit.
        min_chosen: in inference, an image with fewer anchors worth a look on a level is not probed.
        levels: that are probed: 2, P4 and P3, to 0.
    """

    low: float = 0.1
    high: float = 0.7
    overlap: float = 0.25
    output: float = 0.1
    least: int = 5
    most: int = 200
    min_side: float = 3.0
    max_patches: int = 0
    min_chosen: int = 1
    levels: int = 2


class FixedLevels(NamedTuple):
    """What is predicted for every image.

    Attributes:
        quarters: (B, 4, A, 5) on P5: cxcywh relative to the quarter of the image, location logit.
        whole: (B, 1 or 4, A, 5) on P6, relative to the image; of flipped images in training.
    """

    quarters: Tensor
    whole: Tensor


class ProbedLevel(NamedTuple):
    """What is predicted on the probed patches of a level.

    Attributes:
        predictions: (m, A, 5) cxcywh relative to the patch, location logit.
        images: (m,) int64, the image of each patch.
        positions: (m, 2) upper left cell, x and y.
        stride: of the level.
        spare: (m,) bool, True for patches that are there to learn: nothing is given out.
    """

    predictions: Tensor
    images: Tensor
    positions: Tensor
    stride: int
    spare: Tensor


class Anchors(NamedTuple):
    """Anchors of a batch, padded.

    Attributes:
        boxes: (B, N, 4) cxcywh in pixels; in the padding the whole image.
        scores: (B, N) location scores, 0 in the padding.
        mask: (B, N) bool, False in the padding.
        level: (B, N) int64 of the pyramid: 5 for P5 and P6, 4, or 3; 0 in the padding.
    """

    boxes: Tensor
    scores: Tensor
    mask: Tensor
    level: Tensor


class Objects(NamedTuple):
    """What is to be found.

    Attributes:
        boxes: (R, M, 4) cxcywh as shares of the image or patch.
        labels: (R, M) int64.
        mask: (R, M) bool, False in the padding.
    """

    boxes: Tensor
    labels: Tensor
    mask: Tensor
