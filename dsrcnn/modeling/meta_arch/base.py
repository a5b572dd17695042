"""Base of all sparse detectors: from images to features, and from predictions to detections."""

import logging
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.modeling import Backbone, build_backbone
from torch import Tensor

from ...config.validate import CheckedArchitecture, check_model, check_sparse_rcnn
from ...errors import ConfigError
from ...layers.activation_checkpoint import checkpoint_blocks
from ...layers.norm import fold_frozen_norms
from ...structures import Predictions
from ...structures.buckets import smallest_bucket
from ...utils.precision import float32_precision
from ...utils.training import TrainableModel
from ..cuda_graphs import CudaGraphs
from ..postprocessing import (
    Detections,
    DetectionSettings,
    scale_to_originals,
    select_detections,
    to_instances,
)

_LOGGER = logging.getLogger(__name__)


class ImageBatch(NamedTuple):
    """Normalized images, padded to one size.

    Attributes:
        tensor: (B, 3, H, W).
        sizes: (B, 4) ``w, h, w, h`` of each image before padding, in pixels.
        originals: (B, 4) of the original images, which detections refer to.
        original_sizes: (height, width) of the original images.
    """

    tensor: Tensor
    sizes: Tensor
    originals: Tensor
    original_sizes: list[tuple[int, int]]


def size_tensor(image_sizes: list[tuple[int, int]], device: torch.device) -> Tensor:
    """Turn (height, width) pairs into a tensor (B, 4) of ``w, h, w, h``."""
    rows = [(width, height, width, height) for height, width in image_sizes]
    return torch.tensor(rows, dtype=torch.float32).to(device, non_blocking=True)


class SparseDetector(TrainableModel, CheckedArchitecture):
    """Backbone, preprocessing and post-processing; subclasses add what is in between."""

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        *,
        backbone: Backbone,
        in_features: list[str],
        pixel_mean: list[float],
        pixel_std: list[float],
        detection: DetectionSettings,
        checkpoint_backbone: bool,
        pad_to: int,
        buckets: list[tuple[int, int]],
        cuda_graph: bool,
    ) -> None:
        """Assemble the detector.

        Args:
            backbone: images (B, 3, H, W) to a dictionary of pyramid levels (B, D, H_l, W_l).
            in_features: names of the levels in use, finest first.
            pixel_mean: per channel, in the order of ``INPUT.FORMAT``.
            pixel_std: per channel.
            detection: settings of the post-processing.
            checkpoint_backbone: recompute the activations of the backbone in the backward pass.
            pad_to: least side of a padded batch, in pixels.
            buckets: heights and widths that batches are padded to where they fit; () for any.
            cuda_graph: evaluate by CUDA graphs where they can be captured.

        Raises:
            ConfigError: if the backbone lacks one of the levels.
        """
        super().__init__()
        levels = list(backbone.output_shape())
        if not set(in_features) <= set(levels):
            is_pyramid = any(level.startswith("p") for level in levels)
            neck = "a MODEL.BACKBONE.NAME with a neck, such as build_resnet_fpn_backbone or "
            advice = "some of these" if is_pyramid else f"{neck}build_timm_fpn_backbone"
            raise ConfigError(
                f"MODEL.ROI_HEADS.IN_FEATURES names {', '.join(in_features)}, but MODEL.BACKBONE "
                f"has {', '.join(levels)}; write {advice}."
            )
        # Same numbers, fewer passes over memory: frozen norms inside the convolutions, and the
        # memory format in which CPUs and GPUs convolve fastest.
        fold_frozen_norms(backbone)
        self.backbone = backbone.to(memory_format=torch.channels_last)
        if checkpoint_backbone and not checkpoint_blocks(self.backbone):
            raise ConfigError(
                "MODEL.ACTIVATION_CHECKPOINT names the backbone, but this one has no residual "
                "blocks in stages; leave 'backbone' out."
            )
        self.in_features = in_features
        self.detection = detection
        self.pad_to = pad_to
        self.buckets = buckets
        self.graphs = CudaGraphs() if cuda_graph else None
        # Not persistent: official checkpoints do not have them.
        for name, values in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read what the architectures share.

        Raises:
            ConfigError: if the config contradicts itself.
        """
        check_model(cfg)
        if cfg.TEST.CUDA_GRAPH and not cfg.MODEL.DEVICE.startswith("cuda"):
            _LOGGER.info("TEST.CUDA_GRAPH has no effect on %s.", cfg.MODEL.DEVICE)
        return {
            "backbone": build_backbone(cfg),
            "in_features": cfg.MODEL.ROI_HEADS.IN_FEATURES,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "detection": DetectionSettings.from_config(cfg),
            "checkpoint_backbone": "backbone" in cfg.MODEL.ACTIVATION_CHECKPOINT,
            "pad_to": cfg.INPUT.PAD_TO,
            "buckets": [(height, width) for height, width in cfg.INPUT.BUCKETS],
            "cuda_graph": cfg.TEST.CUDA_GRAPH,
        }

    @classmethod
    def check_config(cls, cfg: CfgNode) -> None:
        """Check the keys that all sparse detectors share; see `check_model`."""
        check_sparse_rcnn(cfg)

    @property
    def device(self) -> torch.device:
        """Device of the model; inputs are moved there."""
        return self.pixel_mean.device

    @property
    def all_parameters_get_gradients(self) -> bool:
        """Whether every level with parameters is used, and no map of the network is left out."""
        outputs = list(self.backbone.output_shape())
        top = getattr(self.backbone, "top_block", None)  # an attribute of Detectron2's FPN
        if top is not None and not list(top.parameters()):
            outputs = outputs[: -top.num_levels]  # pooled, without parameters
        body, read = (getattr(self.backbone, name, None) for name in ("bottom_up", "in_features"))
        made = list(body.output_shape()) if isinstance(body, Backbone) else []
        # A neck that does not read the last map leaves the layers of that map without gradients.
        reads_last = not (made and read) or made[-1] in read
        return reads_last and set(outputs) <= set(self.in_features)

    def raw_predictions(
        self, batched_inputs: list[dict[str, Any]], **options: Any
    ) -> tuple[Predictions, ImageBatch]:
        """Run the network without post-processing.

        Args:
            batched_inputs: Detectron2's model inputs.
            **options: of `predict`.

        Returns:
            Predictions with boxes in pixels of the network input, and the images.
        """
        images = self.preprocess_image(batched_inputs)
        return self.predict(images, **options), images

    def predict(self, images: ImageBatch, *, all_stages: bool = False) -> Predictions:
        """Run the network on images.

        Args:
            images: the network input.
            all_stages: return the predictions of all stages in evaluation mode, too.

        Returns:
            Predictions with boxes in pixels of the network input.
        """
        raise NotImplementedError

    def inference(
        self,
        batched_inputs: list[dict[str, Any]],
        *,
        detection: DetectionSettings | None = None,
    ) -> list[dict[str, Any]]:
        """Detect in evaluation mode, by CUDA graphs with ``TEST.CUDA_GRAPH``.

        Args:
            batched_inputs: Detectron2's model inputs.
            detection: limits and NMS; None for those of the config.

        Returns:
            One dictionary with ``instances`` per image, in pixels of the original images.
        """
        kind = type(self)
        is_whole = kind.raw_predictions is SparseDetector.raw_predictions
        is_whole = is_whole and kind.postprocess is SparseDetector.postprocess
        if self.graphs is None or not is_whole:  # a subclass may have replaced a half of the pass
            predictions, images = self.raw_predictions(batched_inputs)
            return self.postprocess(predictions, images, batched_inputs, detection=detection)
        images = self.preprocess_image(batched_inputs)
        detections = self.graphs(self, images[:3], detection or self.detection)
        return _to_outputs(detections, images)

    def detect(
        self, tensor: Tensor, sizes: Tensor, originals: Tensor, settings: DetectionSettings
    ) -> Detections:
        """Detect in padded images: a function of tensors, the whole evaluation pass.

        It can be compiled as a whole, exported, and captured in a CUDA graph; with NMS only if that
        is dense. Arguments are those of `ImageBatch`, and the settings of the post-processing.
        """
        images = ImageBatch(tensor, sizes, originals, [])
        return self.select(self.predict(images), images, settings)

    def graph_key(self) -> Hashable:
        """Return the settings that a CUDA graph has from its capture on."""
        return float32_precision()

    def train(self, mode: bool = True) -> "SparseDetector":
        """Set the mode; training discards the graphs, whose memory it needs."""
        if mode and self.graphs is not None:
            self.graphs.clear()
        return super().train(mode)

    def preprocess_image(self, batched_inputs: list[dict[str, Any]]) -> ImageBatch:
        """Normalize each ``image`` (3, H, W), and pad all with zeros at the right and bottom.

        All get the same height and the same width (`padded_size`).
        """
        images = [
            (x["image"].to(self.device, non_blocking=True) - self.pixel_mean) / self.pixel_std
            for x in batched_inputs
        ]
        sizes = [(x.shape[-2], x.shape[-1]) for x in images]
        padded = self.padded_size(sizes)
        if len(images) == 1:
            (height, width), image = sizes[0], images[0]
            batch = F.pad(image, (0, padded[1] - width, 0, padded[0] - height)).unsqueeze(0)
        else:
            batch = images[0].new_zeros((len(images), 3, *padded))
            for place, image, (height, width) in zip(batch, images, sizes, strict=True):
                place[:, :height, :width].copy_(image)
        originals = [
            (x.get("height", height), x.get("width", width))
            for x, (height, width) in zip(batched_inputs, sizes, strict=True)
        ]
        pixels = size_tensor([*sizes, *originals], self.device)  # one transfer
        inputs, outputs = pixels.split(len(sizes))
        return ImageBatch(batch, inputs, outputs, originals)

    def padded_size(self, sizes: list[tuple[int, int]]) -> tuple[int, int]:
        """Height and width that images of the sizes (height, width) are padded to in a batch.

        The smallest bucket that they fit in, or else their own size; multiples of the backbone's
        size divisibility.
        """
        step = max(self.backbone.size_divisibility, 1)
        height, width = (max(self.pad_to, *sides) for sides in zip(*sizes, strict=True))
        height, width = smallest_bucket((height, width), self.buckets) or (height, width)
        return -(-height // step) * step, -(-width // step) * step

    def extract_features(self, images: ImageBatch) -> list[Tensor]:
        """Run the backbone; returns pyramid levels (B, D, H_l, W_l), finest first."""
        levels = self.backbone(images.tensor.contiguous(memory_format=torch.channels_last))
        return [levels[name] for name in self.in_features]

    def select(
        self, predictions: Predictions, images: ImageBatch, settings: DetectionSettings
    ) -> Detections:
        """Select the detections of the last prediction set, in pixels of the original images.

        A function of tensors: no shape depends on values, and the host never waits.
        """
        last = predictions.logits[-1], predictions.boxes[-1]
        sizes, mask = images.sizes, predictions.mask
        detections = select_detections(*last, settings, sizes=sizes, mask=mask)
        return scale_to_originals(detections, sizes, images.originals)

    def postprocess(
        self,
        predictions: Predictions,
        images: ImageBatch,
        batched_inputs: list[dict[str, Any]],
        *,
        detection: DetectionSettings | None = None,
    ) -> list[dict[str, Any]]:
        """Select the detections of the last prediction set, in pixels of the original images.

        Args:
            predictions: of the network.
            images: the network input.
            batched_inputs: with ``height`` and ``width`` of the original images.
            detection: limits and NMS; None for those of the config.

        Returns:
            One dictionary with ``instances`` per image.
        """
        return _to_outputs(self.select(predictions, images, detection or self.detection), images)


def _to_outputs(detections: Detections, images: ImageBatch) -> list[dict[str, Any]]:
    """Detectron2's outputs of a model."""
    return [
        {"instances": to_instances(detections, index, size)}
        for index, size in enumerate(images.original_sizes)
    ]
