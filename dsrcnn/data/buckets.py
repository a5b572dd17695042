"""Size buckets: a few padded sizes for all batches, chosen from the data.

GPUs prepare plans, graphs and memory for every size they meet, so few sizes are fast ones. Padding
that images do not need is the price, and it is minimized.
"""

import functools
import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data.transforms import ResizeShortestEdge

from ..structures.buckets import Size, smallest_bucket
from .transforms.build import JITTER_RANGE

_LOGGER = logging.getLogger(__name__)
_STEP = 32  # sides of padded batches are multiples of it
_RANGE = 9  # sides that stand for a range of them
_ENOUGH = 4  # batches in a group of records


def merge_sizes(sizes: Counter[Size], count: int) -> list[Size]:
    """Choose at most `count` sizes that contain all others, with little padding.

    The two sizes whose union adds the fewest pixels are merged, again and again.

    Args:
        sizes: how often each (height, width) occurs.
        count: at least 1.

    Returns:
        The sizes, smallest first.
    """
    boxes = np.array(sorted(sizes), dtype=np.float64).reshape(-1, 2)
    weights = np.array([sizes[key] for key in sorted(sizes)], dtype=np.float64)
    while len(boxes) > count:
        areas = boxes.prod(axis=1)
        union = np.maximum(boxes[:, None], boxes[None]).prod(axis=2)
        growth = weights[:, None] * (union - areas[:, None])
        cost = growth + growth.T
        cost[np.tril_indices(len(boxes))] = np.inf
        first, second = np.unravel_index(cost.argmin(), cost.shape)
        boxes[first] = np.maximum(boxes[first], boxes[second])
        weights[first] += weights[second]
        boxes, weights = (np.delete(x, second, axis=0) for x in (boxes, weights))
    chosen = {(int(height), int(width)) for height, width in boxes}
    return sorted(chosen, key=lambda b: (b[0] * b[1], b))


def choose_buckets(cfg: CfgNode, records: Sequence[dict[str, Any]]) -> list[Size]:
    """Choose ``INPUT.NUM_BUCKETS`` padded sizes for the images of records.

    Images count at every size of training and at that of evaluation; those without a recorded size
    are left out. The last bucket contains all others. What fits in none, such as a mosaic, is
    padded to its own size.
    """
    sizes: Counter[Size] = Counter()
    shapes = Counter((int(r["height"]), int(r["width"])) for r in records if "height" in r)
    for shape, number in shapes.items():
        for resized in _resized(cfg, shape):
            sizes[_padded(resized)] += number
    if not sizes:
        _LOGGER.warning("INPUT.NUM_BUCKETS has no effect: no training image has a recorded size.")
        return []
    count = cfg.INPUT.NUM_BUCKETS
    # One contains all others: for crops and for batches of unlike images.
    largest = max(h for h, _ in sizes), max(w for _, w in sizes)
    buckets = merge_sizes(sizes, max(count - 1, 1))
    if count > 1 and largest not in buckets:
        buckets.append(largest)
    pixels = sum(n * h * w for (h, w), n in sizes.items())
    chosen = {size: smallest_bucket(size, buckets) or size for size in sizes}
    padded = sum(n * chosen[size][0] * chosen[size][1] for size, n in sizes.items())
    _LOGGER.info(
        "INPUT.BUCKETS: %d padded sizes of images become %d (%s), with %.0f %% more pixels in the "
        "mean.",
        len(sizes),
        len(buckets),
        ", ".join(f"{h} x {w}" for h, w in buckets),
        100 * (padded / pixels - 1),
    )
    return buckets


def bucket_groups(cfg: CfgNode, records: Sequence[dict[str, Any]]) -> list[int]:
    """Group records by the bucket of their largest size in training.

    Small groups join that of the next bucket that contains their own; see `merge_small_groups`.
    """
    buckets = [(int(h), int(w)) for h, w in cfg.INPUT.BUCKETS]

    @functools.cache
    def group(shape: Size) -> int:
        bucket = smallest_bucket(_padded(_resized(cfg, shape)[-2]), buckets)
        return len(buckets) if bucket is None else buckets.index(bucket)

    groups = [
        group((int(r["height"]), int(r["width"]))) if "height" in r else len(buckets)
        for r in records
    ]
    return merge_small_groups(groups, cfg.SOLVER.IMS_PER_BATCH, buckets)


def orientation_groups(cfg: CfgNode, records: Sequence[dict[str, Any]]) -> list[int]:
    """Group records into landscape and portrait images, as Detectron2 does.

    A small group joins the other one; see `merge_small_groups`.
    """
    groups = [int(r.get("width", 1) > r.get("height", 1)) for r in records]
    return merge_small_groups(groups, cfg.SOLVER.IMS_PER_BATCH)


def merge_small_groups(
    groups: Sequence[int], batch_size: int, buckets: Sequence[Size] = ()
) -> list[int]:
    """Let groups of fewer than four batches join another.

    They would wait long for a full batch, and fill it with the same images.

    Args:
        groups: of each record; the index of a bucket, or any other number.
        batch_size: images of a batch.
        buckets: where a small group can join that of the next bucket that contains its own;
            others join the largest group.

    Returns:
        The groups after merging.
    """
    counts = Counter(groups)
    large = {group for group, count in counts.items() if count >= _ENOUGH * batch_size}

    def target(group: int) -> int:
        if group in large:
            return group
        if group < len(buckets):
            others = [buckets[x] for x in large if x < len(buckets)]
            if bucket := smallest_bucket(buckets[group], others):
                return buckets.index(bucket)
        return counts.most_common(1)[0][0]

    new = {group: target(group) for group in counts}
    return [new[group] for group in groups]


def _resized(cfg: CfgNode, shape: Size) -> list[Size]:
    """Sizes of an image in training, from the smallest to the largest, and in evaluation."""
    node, side = cfg.INPUT, cfg.INPUT.AUG.SCALE_JITTER.SIZE
    test = _shortest_edge(shape, node.MIN_SIZE_TEST, node.MAX_SIZE_TEST)
    if side:
        factors = np.linspace(*JITTER_RANGE, _RANGE) * side / max(shape)
        return [*(_cropped(shape, factor, side) for factor in factors), test]
    sides = sorted(node.MIN_SIZE_TRAIN)
    if node.MIN_SIZE_TRAIN_SAMPLING == "range":
        sides = [round(x) for x in np.linspace(sides[0], sides[-1], _RANGE)]
    return [*(_shortest_edge(shape, short, node.MAX_SIZE_TRAIN) for short in sides), test]


def _shortest_edge(shape: Size, short: int, long: int) -> Size:
    if not short:
        return shape
    height, width = ResizeShortestEdge.get_output_shape(*shape, short, long)
    return height, width


def _cropped(shape: Size, factor: float, side: int) -> Size:
    """Size of an image that large-scale jitter resizes by a factor and crops."""
    height, width = (min(round(length * factor), side) for length in shape)
    return height, width


def _padded(size: Size) -> Size:
    height, width = (-(-max(side, 1) // _STEP) * _STEP for side in size)
    return height, width
