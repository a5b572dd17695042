"""Comparison of an exported model's detections with those of the model."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..errors import ExportError

Detections = tuple[np.ndarray, np.ndarray, np.ndarray]  # boxes (K, 4), scores (K,), labels (K,)

_LOW = 0.05  # scores below it belong to no detection that anyone looks at,
_FEW = 10  # but so many are always compared


class Tolerance(NamedTuple):
    """Largest differences of detections that count as equal.

    Attributes:
        pixels: of box corners, in pixels of the network input.
        score: of scores.
        missing: fraction of detections that may have no counterpart; if above 0, at least one
            detection may be another.
    """

    pixels: float
    score: float
    missing: float = 0.0


FLOAT32 = Tolerance(0.1, 1e-3)
# Rounding to 11 bits decides otherwise where the model hesitates between two boxes of an object.
FLOAT16 = Tolerance(4.0, 0.05, missing=0.1)
_ONE = 2  # entries of one detection that is decided otherwise: one is missing, another is added


class Parity(NamedTuple):
    """Largest differences between detections of the same images.

    Attributes:
        detections: that have a counterpart.
        missing: that have none, within the tolerance.
        pixels: of box corners, in pixels of the network input.
        score: of scores.
    """

    detections: int
    missing: int
    pixels: float
    score: float


def compare(
    expected: Sequence[Detections], actual: Sequence[Detections], tolerance: Tolerance
) -> Parity:
    """Match the detections of images and return the largest differences.

    Scores below 0.05 are not compared beyond the best ten. Those that are nearly the last of a list
    may be missing in the other: rounding decides about them.

    Args:
        expected: detections of each image, boxes in pixels of the network input.
        actual: of the same images.
        tolerance: larger differences are an error.

    Raises:
        ExportError: if more detections than the tolerance allows have no counterpart, or there is
            nothing to compare.
    """
    differences: list[tuple[float, float]] = []
    missing: list[str] = []
    for image, (first, second) in enumerate(zip(expected, actual, strict=True)):
        for one, other, lacks in ((first, second, "lacks"), (second, first, "has added")):
            pairs, texts = _match(one, other, tolerance)
            differences += pairs
            missing += [f"image {image}: the file {lacks} {text}" for text in texts]
    total = len(differences) + len(missing)
    allowed = max(tolerance.missing * total, _ONE) if tolerance.missing and differences else 0
    if len(missing) > allowed:
        advice = "Use another format or version of torch, and report this."
        if tolerance.missing:
            advice = "Export it without --half; TensorRT and OpenVINO convert models themselves."
        raise ExportError(
            f"The exported file and the model disagree in {len(missing)} of {total} detections. "
            f"{missing[0]}, more than {tolerance.pixels} pixels of the network input and "
            f"{tolerance.score}. No file was written. {advice}"
        )
    if not differences:
        raise ExportError(
            "The model detects nothing on the images, so the exported file cannot be compared with "
            "it. Give other images."
        )
    pixels, score = np.max(differences, axis=0)
    return Parity(len(differences), len(missing), float(pixels), float(score))


def _match(
    one: Detections, other: Detections, tolerance: Tolerance
) -> tuple[list[tuple[float, float]], list[str]]:
    """Find a counterpart in `other` for every detection of `one`.

    Returns:
        Differences in pixels and score, and descriptions of those without counterpart.
    """
    boxes, scores, labels = other
    least = min(_LOW, float(np.sort(one[1])[-_FEW:].min(initial=1)))
    last = float(min(one[1].min(initial=1), scores.min(initial=1))) * (1 + 10 * tolerance.score)
    pairs, missing = [], []
    for box, value, label in zip(*one, strict=True):
        if value < least:
            continue
        far = np.abs(boxes - box).max(axis=1, initial=0)
        off = np.abs(scores - value)
        ratio = np.maximum(far / tolerance.pixels, off / tolerance.score)
        ratio = np.where(labels == label, ratio, np.inf)
        best = int(ratio.argmin()) if len(ratio) else -1
        if best >= 0 and ratio[best] <= 1:
            pairs.append((float(far[best]), float(off[best])))
        elif value >= last:
            nearest = "none of this class"
            if best >= 0 and np.isfinite(ratio[best]):
                nearest = f"the nearest differs by {far[best]:.3g} pixels and {off[best]:.2g}"
            corners = np.round(box, 1).tolist()
            missing.append(
                f"a detection of class {label} with score {value:.3f} at {corners}; {nearest}"
            )
    return pairs, missing
