"""Sparse R-CNN (arXiv 2011.12450): the whole detector.

Letters: ``B`` images, ``P`` proposals, ``Q`` prediction sets.
"""

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from torch import Tensor, nn

from ...errors import ConfigError
from ...layers.activation_checkpoint import checkpoint_blocks
from ...layers.frozen_conv import fold_frozen_norms
from ...layers.norms import norms_at_rest
from ...structures import Predictions
from ..assignment_log import AssignmentLog
from ..decoder import Cascade, DynamicHead
from ..inputs import batch_images, image_sizes, pad_targets
from ..losses import LossCounts, SetCriterion
from ..matching import Matcher, build_matcher
from ..postprocess import detections_of, select_detections
from ..proposals import ProposalSource, build_proposals
from ..recollection_log import RecollectionLog
from .official_keys import keep_official_keys

__all__ = ["DynamicSparseRCNN", "SparseRCNN"]


@META_ARCH_REGISTRY.register()
class SparseRCNN(nn.Module):
    """Backbone, proposals, a cascade of stages, set losses; no anchors.

    Suppression of duplicates is for one-to-many assignment only (DLA).
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        in_features: list[str],
        proposals: ProposalSource,
        head: Cascade,
        matcher: Matcher,
        criterion: SetCriterion,
        pixel_mean: list[float],
        pixel_std: list[float],
        focal: bool = True,
        detections_per_image: int = 100,
        nms_threshold: float | None = None,
        nms_class_wise: bool = True,
        assignment_log: AssignmentLog | None = None,
        recollection_log: RecollectionLog | None = None,
        checkpoint_backbone: bool = False,
        pad_to: int = 0,
    ) -> None:
        """Put the parts together.

        Args:
            backbone: images (B, 3, H, W) to a dictionary of pyramid levels (B, D, H_l, W_l).
            in_features: names of the levels the cascade pools from, finest first.
            proposals: levels and sizes (B, 4) to `Proposals`.
            head: levels and `Proposals` to `Predictions`.
            matcher: `Predictions` and `Targets` to an assignment (Q, B, P).
            criterion: `Predictions`, `Targets` and assignment to a dictionary of losses.
            pixel_mean: per channel, in the order of ``INPUT.FORMAT``.
            pixel_std: likewise.
            focal: focal classification; False for softmax.
            detections_per_image: upper limit of detections; never more than proposals.
            nms_threshold: of `suppress_duplicates`; None for no suppression.
            nms_class_wise: whether only boxes of the same class are duplicates.
            assignment_log: writes about the assignment into the training log.
            recollection_log: writes the losses of the plain cascade into it, beside all others.
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
        self.proposals = proposals
        self.head = head
        self.matcher = matcher
        self.criterion = criterion
        self.focal = focal
        self.detections_per_image = detections_per_image
        self.nms_threshold = nms_threshold
        self.nms_class_wise = nms_class_wise
        self.assignment_log = assignment_log
        self.recollection_log = recollection_log
        # Not persistent: official checkpoints do not have them.
        self.register_buffer(
            "pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False
        )
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)
        keep_official_keys(self)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        """Read the whole model from a config."""
        node = cfg.MODEL.SparseRCNN
        suppress = node.NMS.ENABLED
        if suppress is None:  # "where the assignment is one-to-many"
            suppress = node.DLA.ENABLED and node.DLA.MATCHER != "HungarianMatcher"
        return {
            "backbone": build_backbone(cfg),
            "in_features": cfg.MODEL.ROI_HEADS.IN_FEATURES,
            "proposals": build_proposals(cfg),
            "head": DynamicHead(cfg),
            "matcher": build_matcher(cfg),
            "criterion": SetCriterion(cfg),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "focal": node.USE_FOCAL,
            "detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "nms_threshold": node.NMS.THRESHOLD if suppress else None,
            "nms_class_wise": node.NMS.CLASS_WISE,
            "assignment_log": AssignmentLog.from_config(cfg),
            "recollection_log": RecollectionLog.from_config(cfg),
            "checkpoint_backbone": cfg.MODEL.CHECKPOINT.BACKBONE,
            "pad_to": cfg.INPUT.PAD_TO,
        }

    @property
    def trains_every_parameter(self) -> bool:
        """Whether losses reach all parameters; several processes must know it."""
        outputs = list(self.backbone.output_shape())
        top = getattr(self.backbone, "top_block", None)
        if top is not None and not list(top.parameters()):
            outputs = outputs[: -top.num_levels]  # pooled, nothing is learned there
        return bool(self.head.deep_supervision) and set(outputs) <= set(self.in_features)

    @property
    def device(self) -> torch.device:
        """Where the model is now; inputs are moved there."""
        return self.pixel_mean.device

    def forward(
        self,
        inputs: list[dict[str, Any]],
        *,
        normalizers: LossCounts | None = None,
        ends_iteration: bool = True,
    ) -> dict[str, Tensor] | list[dict[str, Any]]:
        """Losses in training mode, detections otherwise.

        Args:
            inputs: Detectron2's model inputs: ``image`` (3, H, W) in the order of
                ``INPUT.FORMAT``; ``instances`` with ``gt_boxes`` and ``gt_classes`` in training;
                ``height`` and ``width`` of the original image otherwise.
            normalizers: see `loss_normalizers`; None where `inputs` are a whole batch.
            ends_iteration: False for all parts of a batch but the last.

        Returns:
            In training the weighted losses by name, otherwise one dictionary per image with
            ``instances``: ``pred_boxes`` in pixels of the original image, ``scores``,
            ``pred_classes``.
        """
        predictions, sizes, network_sizes = self.predict(inputs)
        if self.training:
            targets = pad_targets(inputs, sizes)
            assignment = self.matcher(predictions, targets)
            if self.assignment_log is not None:
                self.assignment_log(self.matcher, predictions, targets, assignment)
            if self.recollection_log is not None:
                self.recollection_log(self.criterion, predictions, targets, assignment, normalizers)
            if ends_iteration and torch.is_grad_enabled():  # not while norms are being estimated
                self.proposals.end_iteration()
            return self.criterion(predictions, targets, assignment, normalizers)
        return self.postprocess(predictions, network_sizes, inputs)

    @torch.no_grad()
    def loss_normalizers(self, parts: list[list[dict[str, Any]]]) -> LossCounts:
        """What the losses of a batch that comes in parts are divided by.

        With it, the gradients of the parts add up to that of the batch in one piece. Where losses
        are divided by positives, every part must be matched beforehand, which costs a second
        forward pass; without DLA the ground truth is enough.

        Args:
            parts: model inputs, as for `forward`.
        """
        counts = []
        with norms_at_rest(self):
            for inputs in parts:
                if self.criterion.counts_targets_only:
                    sizes = image_sizes([x["instances"].image_size for x in inputs], self.device)
                    counts.append(self.criterion.count(pad_targets(inputs, sizes)))
                    continue
                predictions, sizes, _ = self.predict(inputs)
                targets = pad_targets(inputs, sizes)
                assignment = self.matcher(predictions, targets)
                counts.append(self.criterion.count(targets, assignment))
        return self.criterion.normalizers(counts)

    def predict(
        self, inputs: list[dict[str, Any]]
    ) -> tuple[Predictions, Tensor, list[tuple[int, int]]]:
        """Run the network.

        Returns:
            Predictions, sizes (B, 4) as ``w, h, w, h``, and each image's (height, width), all in
            pixels of the network input.
        """
        features, sizes, network_sizes = self.extract(inputs)
        return self.head(features, self.proposals(features, sizes)), sizes, network_sizes

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
        """Detections of the last stage, in pixels of the original images.

        Args:
            predictions: of the network; the last set is used.
            network_sizes: (height, width) of each network input before padding.
            inputs: the model inputs, for ``height`` and ``width`` of the originals.
        """
        found = select_detections(
            predictions.logits[-1],
            predictions.boxes[-1],
            limit=self.detections_per_image,
            focal=self.focal,
            nms_threshold=self.nms_threshold,
            nms_class_wise=self.nms_class_wise,
            sizes=image_sizes(network_sizes, predictions.boxes.device),
        )
        return [
            {"instances": detections_of(found, i, size, record)}
            for i, (size, record) in enumerate(zip(network_sizes, inputs, strict=True))
        ]


@META_ARCH_REGISTRY.register()
class DynamicSparseRCNN(SparseRCNN):
    """The same under the name of its paper (arXiv 2205.02101); its configs enable DLA and DPG."""
