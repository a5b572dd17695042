"""From Detectron2's model inputs to tensors: a padded image batch and padded targets.

Letters: ``B`` images, ``M`` ground truths.
"""

import torch
import torch.nn.functional as F
from detectron2.structures import ImageList
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..structures import Targets

__all__ = ["batch_images", "image_sizes", "pad_targets"]


def batch_images(
    inputs: list[dict],
    pixel_mean: Tensor,
    pixel_std: Tensor,
    size_divisibility: int,
    pad_to: int = 0,
) -> ImageList:
    """Normalise every image, then pad all with zeros at the right and bottom to one size.

    Args:
        inputs: dictionaries with ``image`` (3, H, W).
        pixel_mean: (3, 1, 1).
        pixel_std: (3, 1, 1).
        size_divisibility: both padded sides become multiples of it.
        pad_to: and at least this.
    """
    device = pixel_mean.device
    images = [(x["image"].to(device, non_blocking=True) - pixel_mean) / pixel_std for x in inputs]
    sizes = [(x.shape[-2], x.shape[-1]) for x in images]
    height, width = sizes[0]  # the first image takes all others along
    images[0] = F.pad(images[0], (0, max(pad_to - width, 0), 0, max(pad_to - height, 0)))
    return ImageList(ImageList.from_tensors(images, size_divisibility).tensor, sizes)


def image_sizes(sizes: list[tuple[int, int]], device: torch.device) -> Tensor:
    """(B, 4) ``w, h, w, h`` in pixels from a list of (height, width)."""
    rows = [(width, height, width, height) for height, width in sizes]
    return torch.tensor(rows, dtype=torch.float32).to(device, non_blocking=True)


def pad_targets(inputs: list[dict], sizes: Tensor) -> Targets:
    """Ground truth of the batch, padded to the image with most objects.

    Lengths are known on the host, so padding needs no synchronisation.

    Args:
        inputs: dictionaries with ``instances`` (``gt_boxes``, ``gt_classes``).
        sizes: (B, 4) from `image_sizes`; its device is used.

    Raises:
        KeyError: if an input has no ``instances``.
    """
    instances = [x["instances"] for x in inputs]
    counts = torch.tensor([len(x) for x in instances])
    mask = torch.arange(int(counts.max())) < counts.unsqueeze(1)
    boxes = pad_sequence([x.gt_boxes.tensor.float() for x in instances], batch_first=True)
    labels = pad_sequence([x.gt_classes.long() for x in instances], batch_first=True)
    boxes, labels, mask = (x.to(sizes.device, non_blocking=True) for x in (boxes, labels, mask))
    return Targets(boxes.view(*mask.shape, 4), labels.view(mask.shape), mask, sizes)
