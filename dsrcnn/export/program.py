"""A detector as one function of tensors: any image in, detections in its pixels out."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers.norm import merge_frozen_norms
from ..modeling.meta_arch.base import ImageBatch
from ..modeling.meta_arch.sparse_rcnn import SparseRCNN
from ..modeling.postprocessing import DetectionSettings
from .resize import resize_to_canvas


class DetectionProgram(nn.Module):
    """A cascade with its pre- and post-processing, of fixed shapes after the resizing.

    Attributes:
        half_precision: whether the network runs under autocast with float16.
    """

    def __init__(
        self,
        model: SparseRCNN,
        canvas: tuple[int, int],
        detection: DetectionSettings,
        *,
        bgr: bool,
    ) -> None:
        """Prepare the evaluation of a model.

        Args:
            model: its frozen norms are merged into convolutions, so give a copy.
            canvas: height and width in pixels that images are resized to fit.
            detection: limit and NMS.
            bgr: channel order of the network input.
        """
        super().__init__()
        self.model = model.eval()
        self.canvas = canvas
        step = max(model.backbone.size_divisibility, 1)
        self.padded = (-(-canvas[0] // step) * step, -(-canvas[1] // step) * step)
        self.bgr = bgr
        self.half_precision = False
        self.detection = replace(detection, dense_nms=True)
        merge_frozen_norms(model)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Detect objects in images of one size.

        Args:
            images: (B, h, w, 3) uint8 RGB.

        Returns:
            Boxes (B, K, 4) xyxy in pixels of the images, scores (B, K), best first, and labels (B,
            K) int64. A score of 0 is no detection.
        """
        batch = self._preprocess(images)
        with self._precision(images.device):
            predictions = self.model.predict(batch)
        detections = self.model.select(predictions, batch, self.detection)
        scores = detections.scores * detections.kept
        limit, most = self.detection.limit, scores.shape[1]
        scores, order = scores.topk(min(limit, most) if limit >= 0 else most, dim=1)
        boxes = detections.boxes.gather(1, order.unsqueeze(-1).expand(-1, -1, 4))
        return boxes, scores, detections.classes.gather(1, order)

    def _preprocess(self, images: Tensor) -> ImageBatch:
        """Resize, normalize and pad."""
        pixels, before, after = resize_to_canvas(images, self.canvas)
        if self.bgr:
            pixels = pixels.flip(1)
        rows, columns = (torch.arange(n, device=images.device) for n in self.canvas)
        inside = (rows < after[0]).unsqueeze(1) & (columns < after[1])
        pixels = (pixels - self.model.pixel_mean) / self.model.pixel_std * inside
        bottom, right = (self.padded[i] - self.canvas[i] for i in (0, 1))
        pixels = F.pad(pixels, (0, right, 0, bottom))
        shape = (images.shape[0], 4)
        sizes, originals = (x.flip(0).repeat(2).float().expand(shape) for x in (after, before))
        return ImageBatch(pixels, sizes, originals, [])

    def half_layers(self, images: Tensor) -> set[str]:
        """Names of the convolutions and linear layers that autocast computes in half precision.

        Args:
            images: (B, h, w, 3) uint8, to run once.
        """
        names, handles = set[str](), []
        for name, layer in self.named_modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):

                def note(layer: nn.Module, *_: object, name: str = name) -> None:
                    if torch.is_autocast_enabled(images.device.type):
                        names.add(name)

                handles.append(layer.register_forward_pre_hook(note))
        with torch.no_grad():
            self(images)
        for handle in handles:
            handle.remove()
        return names

    @contextmanager
    def _precision(self, device: torch.device) -> Iterator[None]:
        if not self.half_precision:
            yield
            return
        with torch.autocast(device.type, dtype=torch.float16, cache_enabled=False):
            yield
