"""From Detectron2's model inputs to tensors: a padded image batch and padded targets.

Letters: ``B`` images, ``M`` ground truths.
"""

from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.modeling import Backbone, build_backbone
from detectron2.structures import ImageList
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ...config import check_model
from ...errors import ConfigError
from ...layers.activation_checkpoint import checkpoint_blocks
from ...layers.norm import fold_frozen_norms
from ...structures import Predictions, Targets
from ..postprocessing import detections_of, select_detections

__all__ = ["SparseDetector", "batch_images", "image_sizes", "pad_targets"]


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


class SparseDetector(nn.Module):
    """Backbone, batches, detections; what is between them is up to subclasses."""

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        *,
        backbone: Backbone,
        in_features: list[str],
        pixel_mean: list[float],
        pixel_std: list[float],
        focal: bool = True,
        detections_per_image: int = 100,
        candidates: int | None = None,
        nms_threshold: float | None = None,
        nms_class_wise: bool = True,
        checkpoint_backbone: bool = False,
        pad_to: int = 0,
    ) -> None:
        """Put the parts together.

        Args:
            backbone: images (B, 3, H, W) to a dictionary of pyramid levels (B, D, H_l, W_l).
            in_features: names of the levels that are used, finest first.
            pixel_mean: per channel, in the order of ``INPUT.FORMAT``.
            pixel_std: likewise.
            focal: focal classification; False for softmax.
            detections_per_image: upper limit of detections; see `select_detections`.
            candidates: see `select_detections`.
            nms_threshold: of `suppress_duplicates`; None for no suppression.
            nms_class_wise: whether only boxes of the same class are duplicates.
            checkpoint_backbone: compute the activations of its blocks again for the gradient.
            pad_to: least side of the batches that images are padded to, in pixels.

        Raises:
            ConfigError: if the backbone lacks one of the levels.
        """
        super().__init__()
        levels = list(backbone.output_shape())
        if not set(in_features) <= set(levels):
            raise ConfigError(
                f"MODEL.ROI_HEADS.IN_FEATURES names {', '.join(in_features)}, but MODEL.BACKBONE "
                f"gives {', '.join(levels)}; write a MODEL.BACKBONE.NAME with a neck, such as "
                "build_resnet_fpn_backbone or build_timm_fpn_backbone."
            )
        # Same numbers, fewer passes over memory: frozen norms inside the convolutions, and the
        # layout in which both CPU and GPU convolve fastest.
        fold_frozen_norms(backbone)
        self.backbone = backbone.to(memory_format=torch.channels_last)
        if checkpoint_backbone:
            checkpoint_blocks(self.backbone)
        self.in_features = in_features
        self.pad_to = pad_to
        self.focal = focal
        self.detections_per_image = detections_per_image
        self.candidates = candidates
        self.nms_threshold = nms_threshold
        self.nms_class_wise = nms_class_wise
        # Not persistent: official checkpoints do not have them.
        self.register_buffer(
            "pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False
        )
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read what the architectures share.

        Raises:
            ConfigError: if the config contradicts itself.
        """
        check_model(cfg)
        node = cfg.MODEL.SparseRCNN
        suppress = node.NMS.ENABLED
        if suppress is None:  # "where the assignment is one-to-many"
            suppress = node.DLA.ENABLED and node.DLA.MATCHER != "HungarianMatcher"
        return {
            "backbone": build_backbone(cfg),
            "in_features": cfg.MODEL.ROI_HEADS.IN_FEATURES,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "focal": node.USE_FOCAL,
            "detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "nms_threshold": node.NMS.THRESHOLD if suppress else None,
            "nms_class_wise": node.NMS.CLASS_WISE,
            "checkpoint_backbone": cfg.MODEL.CHECKPOINT.BACKBONE,
            "pad_to": cfg.INPUT.PAD_TO,
        }

    @property
    def device(self) -> torch.device:
        """Where the model is now; inputs are moved there."""
        return self.pixel_mean.device

    @property
    def uses_every_level(self) -> bool:
        """Whether everything that the backbone learns has a consumer."""
        outputs = list(self.backbone.output_shape())
        top = getattr(self.backbone, "top_block", None)
        if top is not None and not list(top.parameters()):
            outputs = outputs[: -top.num_levels]  # pooled, nothing is learned there
        return set(outputs) <= set(self.in_features)

    def predict(
        self, inputs: list[dict[str, Any]]
    ) -> tuple[Predictions, Tensor, list[tuple[int, int]]]:
        """Run the network.

        Args:
            inputs: Detectron2's model inputs.

        Returns:
            Predictions, sizes (B, 4) as ``w, h, w, h``, and each image's (height, width), all in
            pixels of the network input.
        """
        raise NotImplementedError

    def extract(
        self, inputs: list[dict[str, Any]]
    ) -> tuple[list[Tensor], Tensor, list[tuple[int, int]]]:
        """Run the backbone.

        Returns:
            Pyramid levels (B, D, H_l, W_l), finest first, and sizes as `predict` gives them.
        """
        divisor = self.backbone.size_divisibility
        images = batch_images(inputs, self.pixel_mean, self.pixel_std, divisor, self.pad_to)
        sizes = image_sizes(images.image_sizes, self.device)
        levels = self.backbone(images.tensor.contiguous(memory_format=torch.channels_last))
        features = [levels[name] for name in self.in_features]
        return features, sizes, images.image_sizes

    def postprocess(
        self,
        predictions: Predictions,
        network_sizes: list[tuple[int, int]],
        inputs: list[dict[str, Any]],
    ) -> list[dict[str, Any]]:
        """Detections of the last prediction set, in pixels of the original images.

        Args:
            predictions: of the network.
            network_sizes: (height, width) of each network input before padding.
            inputs: the model inputs, for ``height`` and ``width`` of the originals.
        """
        found = select_detections(
            predictions.logits[-1],
            predictions.boxes[-1],
            limit=self.detections_per_image,
            focal=self.focal,
            candidates=self.candidates,
            nms_threshold=self.nms_threshold,
            nms_class_wise=self.nms_class_wise,
            sizes=image_sizes(network_sizes, predictions.boxes.device),
            mask=predictions.mask,
        )
        return [
            {"instances": detections_of(found, i, size, record)}
            for i, (size, record) in enumerate(zip(network_sizes, inputs, strict=True))
        ]
