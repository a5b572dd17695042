"""A detector as one function of tensors: any image in, detections in its pixels out."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.structures import Instances
from torch import Tensor, nn

from ..layers.norm import fold_frozen_norms, merge_frozen_norms
from ..modeling.meta_arch.base import ImageBatch
from ..modeling.meta_arch.sparse_rcnn import SparseRCNN
from ..modeling.postprocessing import DetectionSettings
from .parity import Detections
from .resize import resize_to_canvas, resize_to_fit

Outputs = tuple[Tensor, Tensor, Tensor]


class Program(nn.Module, ABC):
    """A detector with its pre- and post-processing, of fixed shapes after the resizing.

    Attributes:
        model: in evaluation mode, its frozen norms merged into convolutions.
        canvas: height and width in pixels that images are resized to fit.
        padded: those of the network input.
        nms: IoU of NMS; None without.
        limit: most detections of an image; negative for no limit.
        half_precision: whether the network runs under autocast with float16.
    """

    model: Any
    nms: float | None
    limit: int

    def __init__(self, model: nn.Module, canvas: tuple[int, int], *, bgr: bool) -> None:
        """Prepare the evaluation of a model.

        Args:
            model: its frozen norms are merged into convolutions, so give a copy.
            canvas: height and width in pixels that images are resized to fit.
            bgr: channel order of the network input.
        """
        super().__init__()
        self.model = model.eval()
        self.canvas = canvas
        step = max(self.model.backbone.size_divisibility, 1)
        self.padded = (-(-canvas[0] // step) * step, -(-canvas[1] // step) * step)
        self.bgr = bgr
        self.half_precision = False
        fold_frozen_norms(model)
        merge_frozen_norms(model)

    def forward(self, images: Tensor) -> Outputs:
        """Detect objects in images of one size.

        Args:
            images: (B, h, w, 3) uint8 RGB.

        Returns:
            Boxes (B, K, 4) xyxy in pixels of the images, scores (B, K), best first, and labels (B,
            K) int64. A score of 0 is no detection.
        """
        return self.detect(self._preprocess(images))

    @abstractmethod
    def detect(self, batch: ImageBatch) -> Outputs:
        """Detect objects in a batch, see `forward`."""

    def reference(self, model: Any, image: np.ndarray) -> Detections:
        """Detect objects by the code of evaluation, to compare with.

        Args:
            model: that the program was made of, untouched.
            image: (h, w, 3) uint8 RGB, resized as the program does (`check_resizing`): a gray level
                would be a difference of its own.
        """
        pixels = resize_to_fit(image, self.canvas)
        pixels = pixels[..., ::-1] if self.bgr else pixels
        tensor = torch.as_tensor(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        record = {"image": tensor, "height": image.shape[0], "width": image.shape[1]}
        with torch.inference_mode():
            instances = self.evaluate(model, record)
        fields = (instances.pred_boxes.tensor, instances.scores, instances.pred_classes)
        boxes, scores, labels = (field.cpu().numpy() for field in fields)
        return boxes, scores, labels

    @abstractmethod
    def evaluate(self, model: Any, record: dict[str, Any]) -> Instances:
        """Run the evaluation of a model on a resized image, padded as the program pads it.

        Args:
            model: that the program was made of, untouched.
            record: input of Detectron2's models.
        """

    def best(self, boxes: Tensor, scores: Tensor, labels: Tensor) -> Outputs:
        """Return as many of the outputs as the limit allows, best first."""
        most = scores.shape[1]
        scores, order = scores.topk(min(self.limit, most) if self.limit >= 0 else most, dim=1)
        boxes = boxes.gather(1, order.unsqueeze(-1).expand(-1, -1, 4))
        return boxes, scores, labels.gather(1, order)

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

    def pad(self, batch: Tensor) -> Tensor:
        """Pad or cut a padded batch (B, 3, h, w) to the size of the network input."""
        height, width = batch.shape[-2:]
        return F.pad(batch, (0, self.padded[1] - width, 0, self.padded[0] - height))

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
    def precision(self, device: torch.device) -> Iterator[None]:
        """Run a block in the precision of the program."""
        if not self.half_precision:
            yield
            return
        with torch.autocast(device.type, dtype=torch.float16, cache_enabled=False):
            yield


class DetectionProgram(Program):
    """A cascade."""

    def __init__(
        self,
        model: SparseRCNN,
        canvas: tuple[int, int],
        detection: DetectionSettings,
        *,
        bgr: bool,
    ) -> None:
        """Set limit and NMS; see `Program` for the rest."""
        super().__init__(model, canvas, bgr=bgr)
        self.padded = model.padded_size([canvas])
        self.detection = replace(detection, dense_nms=True)
        self.nms, self.limit = detection.nms_threshold, detection.limit

    def detect(self, batch: ImageBatch) -> Outputs:
        """Detect objects in a batch, see `forward`."""
        with self.precision(batch.tensor.device):
            predictions = self.model.predict(batch)
        detections = self.model.select(predictions, batch, self.detection)
        scores = detections.scores * detections.kept
        return self.best(detections.boxes, scores, detections.classes)

    def evaluate(self, model: SparseRCNN, record: dict[str, Any]) -> Instances:
        """Run the evaluation of a cascade, with NMS by torchvision; see `Program`."""
        images = model.preprocess_image([record])
        images = images._replace(tensor=self.pad(images.tensor))
        detection = replace(self.detection, dense_nms=False)
        predictions = model.predict(images)
        (output,) = model.postprocess(predictions, images, [record], detection=detection)
        return output["instances"]
