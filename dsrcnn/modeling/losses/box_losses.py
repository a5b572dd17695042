"""Box losses of positive proposals."""

import torch
from torch import Tensor

from ...structures import box_xyxy_to_cxcywh, pairwise_overlaps


def box_losses(
    boxes: Tensor,
    targets: Tensor,
    positive: Tensor,
    sizes: Tensor,
    overlap: str = "giou",
    *,
    l1_of_centers: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """L1 and overlap loss, and IoU, of positive proposals (Sparse R-CNN section 3.4: GIoU).

    Background proposals are replaced before the losses, not multiplied by zero after them, so that
    a background box that is not finite affects neither losses nor gradients.

    Args:
        boxes: (Q, B, P, 4) predicted, xyxy in pixels.
        targets: (Q, B, P, 4) target box of each proposal; any values for background.
        positive: (Q, B, P) bool.
        sizes: (B, 4) ``w, h, w, h`` of each image; L1 compares boxes divided by it.
        overlap: see `pairwise_overlaps`; the loss is 1 minus it.
        l1_of_centers: whether L1 compares centers and sizes, as DETR does, instead of corners.

    Returns:
        Two tensors (Q,), sums over the positives of a set; IoUs (Q, B, P), 1 for background.
    """
    placeholder = boxes.new_zeros(4)
    placeholder[2:] = 1.0  # filled on the device: a tensor from a list would be a transfer
    keep = positive.unsqueeze(-1)
    boxes = torch.where(keep, boxes, placeholder)
    targets = torch.where(keep, targets.to(boxes.dtype), placeholder)
    difference = boxes - targets
    if l1_of_centers:
        difference = box_xyxy_to_cxcywh(difference)
    l1 = (difference.abs() / sizes.unsqueeze(1)).sum(dim=(1, 2, 3))
    # One proposal with one target each. torchvision's losses of these names select by a mask, which
    # synchronizes with the device.
    iou, overlaps = pairwise_overlaps(boxes.unsqueeze(-2), targets.unsqueeze(-2), overlap)
    loss = (1 - overlaps.flatten(2)).masked_fill(~positive, 0.0).sum(dim=(1, 2))
    return l1, loss, iou.flatten(2)
