"""ASAG (arXiv 2308.09242): the whole detector.

Notation: ``N`` anchors (padded), ``n`` denoising queries, ``P = n + N`` queries.
"""

from dataclasses import replace
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor

from ...config.validate import check_adamixer, check_asag, check_model, check_unused
from ...structures import Predictions, Targets, at_least_float32, box_cxcywh_to_xyxy
from ...utils.events import ScalarLog
from ...utils.training import iteration_ends, training_context
from ..asag.anchor_generator import AnchorGenerator, Anchors, ProbedLevel, anchor_statistics
from ..asag.criterion import ASAGCriterion, ASAGNormalizers
from ..asag.patches import RelativeTargets, TrainingPatches
from ..asag.queries import (
    DECODERS,
    InitialQueries,
    ParallelDecoders,
    QueryInitializer,
    attention_mask,
    noisy_queries,
)
from .base import ImageBatch, SparseDetector, size_tensor


@META_ARCH_REGISTRY.register()
class ASAG(SparseDetector):
    """Anchors predicted from the image, queries at them, and one decoder layer that refines these.

    With AdaMixer's decoder layer it is ASAG-A, with Sparse R-CNN's ASAG-S.

    Attributes:
        iteration: training iterations so far, a buffer.
    """

    iteration: Tensor

    @configurable
    def __init__(
        self,
        *,
        generator: AnchorGenerator,
        initializer: QueryInitializer,
        decoders: ParallelDecoders,
        criterion: ASAGCriterion,
        guided_iterations: int,
        denoising_queries: int,
        log: ScalarLog,
        **shared: Any,
    ) -> None:
        """Assemble the detector.

        Args:
            generator: levels and sizes to anchors.
            initializer: RoI features and boxes to queries.
            decoders: levels and queries to predictions.
            criterion: all losses.
            guided_iterations: iterations at the start whose training patches are around ground
                truths, see `TrainingPatches`.
            denoising_queries: ``n`` in training; 0 for none.
            log: for statistics of the anchors (``asag/*``).
            **shared: see `SparseDetector`.
        """
        super().__init__(**shared)
        self.generator = generator
        self.initializer = initializer
        self.decoders = decoders
        self.criterion = criterion
        self.guided_iterations = guided_iterations
        self.denoising_queries = denoising_queries
        self.log = log
        self.register_buffer("iteration", torch.zeros((), dtype=torch.int64))

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read the whole model from a config."""
        check_model(cfg)
        node = cfg.MODEL.ASAG
        decoders = DECODERS[node.DECODER](cfg)  # built first: its initial weights are drawn first
        shared = super().from_config(cfg)
        # Only the best scores enter NMS (if it is on), as published.
        detection = replace(shared["detection"], candidates=cfg.TEST.DETECTIONS_PER_IMAGE)
        return {
            **shared,
            "detection": detection,
            "generator": AnchorGenerator(cfg),
            "initializer": QueryInitializer(cfg),
            "decoders": decoders,
            "criterion": ASAGCriterion(cfg),
            "guided_iterations": round(node.GUIDED_PART * cfg.SOLVER.MAX_ITER),
            "denoising_queries": node.DN.NUM if node.DN.ENABLED else 0,
            "log": ScalarLog(cfg.LOG.PERIOD),
        }

    @classmethod
    def check_config(cls, cfg: CfgNode) -> None:
        """Check the keys of sparse detectors, of AdaMixer's decoder and of ASAG."""
        super().check_config(cfg)
        check_adamixer(cfg)
        check_asag(cfg)
        check_unused(cfg, DECODERS[cfg.MODEL.ASAG.DECODER].unused_keys)

    @property
    def all_parameters_get_gradients(self) -> bool:
        """Whether every level is used, by the backbone's neck and by the generator."""
        return super().all_parameters_get_gradients and self.generator.probes_every_level

    def forward(
        self, batched_inputs: list[dict[str, Any]]
    ) -> dict[str, Tensor] | list[dict[str, Any]]:
        """Compute losses in training mode, detections otherwise, in Detectron2's formats."""
        if not self.training:
            return self.inference(batched_inputs)
        images = self.preprocess_image(batched_inputs)
        features = self.extract_features(images)
        targets = Targets.from_inputs(batched_inputs, images.sizes)
        with torch.autocast(self.device.type, enabled=False):
            losses = self._losses([at_least_float32(x) for x in features], targets)
        if iteration_ends():
            self.iteration += 1
        return losses

    @torch.no_grad()
    def loss_normalizers(self, parts: list[list[dict[str, Any]]]) -> ASAGNormalizers:
        """Return the loss normalizers of a batch that is processed in parts.

        The losses of probed patches are averaged over those of a part, not of the batch, so
        gradients differ a little where images have different numbers of patches.
        """
        counts = []
        for inputs in parts:
            sizes = size_tensor([x["instances"].image_size for x in inputs], self.device)
            counts.append(self.criterion.count(Targets.from_inputs(inputs, sizes)))
        return self.criterion.normalizers(counts)

    def predict(self, images: ImageBatch, *, all_stages: bool = False) -> Predictions:
        """Run the network on images; `all_stages` is ignored, as there is one stage.

        Returns:
            Predictions of the decoder in use (of all decoders in training mode) with a mask of real
            anchors.
        """
        features = self.extract_features(images)
        with torch.autocast(self.device.type, enabled=False):
            features = [at_least_float32(x) for x in features]
            anchors, _ = self.anchors(features, images.sizes)
            return self.decode(features, anchors)

    def anchors(self, features: list[Tensor], sizes: Tensor) -> tuple[Anchors, list[ProbedLevel]]:
        """Generate anchors, and return the predictions on probed patches with them.

        The last three levels have strides 8, 16 and 32; sizes (B, 4) are in pixels.
        """
        anchors, _, probed = self.generator(features[-3:], sizes)
        return anchors, probed

    def decode(self, features: list[Tensor], anchors: Anchors) -> Predictions:
        """Predict classes and boxes at anchors, with their mask."""
        boxes, mask = box_cxcywh_to_xyxy(anchors.boxes), attention_mask(anchors.mask)
        return self._initialize_and_refine(features, boxes, mask)[1]._replace(mask=anchors.mask)

    def _losses(self, features: list[Tensor], targets: Targets) -> dict[str, Tensor]:
        """Weighted losses by name."""
        normalizers = training_context().normalizers
        if normalizers is None:
            normalizers = self.criterion.normalizers([self.criterion.count(targets)])
        training_patches = TrainingPatches(
            [b[m] for b, m in zip(targets.boxes, targets.mask, strict=True)],
            targets.sizes,
            guided=bool(self.iteration < self.guided_iterations),
        )
        anchors, fixed, probed = self.generator(features[-3:], targets.sizes, training_patches)
        if self.log.is_due():
            self.log.write("asag", anchor_statistics(anchors, probed))
        boxes, mask = box_cxcywh_to_xyxy(anchors.boxes), attention_mask(anchors.mask)
        count = self.denoising_queries
        if count:
            noisy = noisy_queries(RelativeTargets.from_targets(targets), count)
            noisy_boxes = box_cxcywh_to_xyxy(noisy.boxes) * targets.sizes.unsqueeze(1)
            boxes = torch.cat([noisy_boxes, boxes], dim=1)
            mask = attention_mask(anchors.mask, noisy.group)
        queries, decoded = self._initialize_and_refine(features, boxes, mask)
        predictions = Predictions(  # the initializer first
            torch.cat([queries.logits[None], decoded.logits]),
            torch.cat([queries.boxes[None], decoded.boxes]),
            torch.cat([decoded.stage[:1], decoded.stage]),  # no loss reads these
        )
        losses = self.criterion.of_anchors(fixed, probed, targets, normalizers)
        at_anchors = predictions.of_proposals(slice(count, None))
        losses.update(self.criterion.of_detections(at_anchors, anchors.mask, targets, normalizers))
        if count:
            denoised = predictions.of_proposals(slice(0, count))
            losses |= self.criterion.of_denoising(denoised, noisy.assignment, targets, normalizers)
        return losses

    def _initialize_and_refine(
        self, features: list[Tensor], boxes: Tensor, mask: Tensor
    ) -> tuple[InitialQueries, Predictions]:
        """Initialize queries at boxes (B, P, 4), denoising ones first, and refine them."""
        table = self.decoders.pooler.prepare(features)  # initializer and decoders share the pooler
        queries = self.initializer(self.decoders.pooler(table, boxes), boxes, mask)
        return queries, self.decoders(features, table, queries, mask)
