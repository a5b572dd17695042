"""ASAG (arXiv 2308.09242): the whole detector.

Letters: ``B`` images, ``N`` anchors (padded), ``n`` denoising queries.
"""

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor

from ...structures import Predictions, Targets, at_least_float32, box_cxcywh_to_xyxy
from ..asag import (
    AnchorGenerator,
    AnchorLog,
    Anchors,
    ASAGCounts,
    ASAGCriterion,
    InitialQueries,
    NoisyQueries,
    ParallelDecoders,
    PatchLessons,
    ProbedLevel,
    QueryInitializer,
    attention_mask,
    build_decoders,
    build_generator,
    denoising_mask,
    noisy_queries,
    objects_of,
)
from ..decoder import RoIFeatures
from .base import SparseDetector, image_sizes, pad_targets

__all__ = ["ASAG"]


@META_ARCH_REGISTRY.register()
class ASAG(SparseDetector):
    """Anchors of the image, queries from what is there, and one decoder layer that refines them.

    With AdaMixer's decoder layer it is ASAG-A, with Sparse R-CNN's ASAG-S.

    Attributes:
        iteration: training steps so far, a buffer.
    """

    iteration: Tensor

    @configurable
    def __init__(
        self,
        *,
        generator: AnchorGenerator,
        rois: RoIFeatures,
        initializer: QueryInitializer,
        decoders: ParallelDecoders,
        criterion: ASAGCriterion,
        train_patches: int = 4,
        guided_iterations: int = 0,
        denoising_queries: int = 0,
        noise: float = 0.4,
        log: AnchorLog | None = None,
        **shared: Any,
    ) -> None:
        """Put the parts together.

        Args:
            generator: levels and sizes to anchors.
            rois: levels and boxes to RoI features.
            initializer: RoI features and boxes to queries.
            decoders: levels and queries to predictions.
            criterion: all losses.
            train_patches: patches of every image and level to learn from, at least.
            guided_iterations: steps at the start in which patches are around objects, and not
                where the generator, which knows nothing yet, looks for them.
            denoising_queries: ``n`` in training; 0 for none.
            noise: see `noisy_queries`.
            log: writes about anchors into the training log.
            **shared: see `SparseDetector`.
        """
        super().__init__(**shared)
        self.generator = generator
        self.rois = rois
        self.initializer = initializer
        self.decoders = decoders
        self.criterion = criterion
        self.train_patches = train_patches
        self.guided_iterations = guided_iterations
        self.denoising_queries = denoising_queries
        self.noise = noise
        self.log = log
        self.register_buffer("iteration", torch.zeros((), dtype=torch.int64))

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read the whole model from a config."""
        node = cfg.MODEL.ASAG
        decoders = build_decoders(cfg)
        return {
            **super().from_config(cfg),
            "candidates": cfg.TEST.DETECTIONS_PER_IMAGE,
            "generator": build_generator(cfg),
            "rois": decoders.rois,
            "initializer": QueryInitializer(cfg),
            "decoders": decoders,
            "criterion": ASAGCriterion(cfg),
            "train_patches": node.TRAIN_PATCHES,
            "guided_iterations": round(node.GUIDED_PART * cfg.SOLVER.MAX_ITER),
            "denoising_queries": node.DN.NUM if node.DN.ENABLED else 0,
            "noise": node.DN.NOISE,
            "log": AnchorLog.from_config(cfg),
        }

    @property
    def trains_every_parameter(self) -> bool:
        """Whether losses reach all parameters; several processes must know it."""
        return self.uses_every_level and self.generator.probes_every_level

    def forward(
        self,
        inputs: list[dict[str, Any]],
        *,
        normalizers: ASAGCounts | None = None,
        ends_iteration: bool = True,
    ) -> dict[str, Tensor] | list[dict[str, Any]]:
        """Losses in training mode, detections otherwise; see `SparseRCNN.forward`."""
        if not self.training:
            predictions, _, network_sizes = self.predict(inputs)
            return self.postprocess(predictions, network_sizes, inputs)
        features, sizes, _ = self.extract(inputs)
        targets = pad_targets(inputs, sizes)
        counts = normalizers or self.criterion.normalizers([self.criterion.count(targets)])
        with torch.autocast(sizes.device.type, enabled=False):
            losses = self.losses([at_least_float32(x) for x in features], targets, counts)
        if ends_iteration and torch.is_grad_enabled():  # not while norms are being estimated
            self.iteration += 1
        return losses

    @torch.no_grad()
    def loss_normalizers(self, parts: list[list[dict[str, Any]]]) -> ASAGCounts:
        """What the losses of a batch that comes in parts are divided by.

        (The factor of probed patches stays that of each part, as it is that of each process.)
        """
        counts = []
        for inputs in parts:
            sizes = image_sizes([x["instances"].image_size for x in inputs], self.device)
            counts.append(self.criterion.count(pad_targets(inputs, sizes)))
        return self.criterion.normalizers(counts)

    def predict(
        self, inputs: list[dict[str, Any]]
    ) -> tuple[Predictions, Tensor, list[tuple[int, int]]]:
        """See `SparseDetector`; there is a proposal mask."""
        features, sizes, network_sizes = self.extract(inputs)
        with torch.autocast(sizes.device.type, enabled=False):
            features = [at_least_float32(x) for x in features]
            anchors, _ = self.anchors(features, sizes)
            return self.decode(features, anchors), sizes, network_sizes

    def anchors(self, features: list[Tensor], sizes: Tensor) -> tuple[Anchors, list[ProbedLevel]]:
        """Anchors of images, and what was probed for them.

        Args:
            features: pyramid levels, the last three of which have strides 8, 16 and 32.
            sizes: (B, 4) ``w, h, w, h`` in pixels.
        """
        anchors, _, probed = self.generator(features[-3:], sizes)
        return anchors, probed

    def decode(self, features: list[Tensor], anchors: Anchors) -> Predictions:
        """What is at anchors: predictions with a proposal mask.

        Args:
            features: pyramid levels.
            anchors: of the same images.
        """
        boxes, mask = box_cxcywh_to_xyxy(anchors.boxes), attention_mask(anchors.mask)
        return self._decode(features, boxes, mask)[1]._replace(mask=anchors.mask)

    def losses(
        self, features: list[Tensor], targets: Targets, counts: ASAGCounts
    ) -> dict[str, Tensor]:
        """Weighted losses by name.

        Args:
            features: pyramid levels.
            targets: ground truth.
            counts: divisors.
        """
        lessons = PatchLessons(
            [b[m] for b, m in zip(targets.boxes, targets.mask, strict=True)],
            targets.sizes,
            least=self.train_patches,
            threshold=self.generator.rule.overlap,
            guided=bool(self.iteration < self.guided_iterations),
        )
        anchors, fixed, probed = self.generator(features[-3:], targets.sizes, lessons)
        if self.log is not None:
            self.log(anchors, probed)
        boxes, mask = box_cxcywh_to_xyxy(anchors.boxes), attention_mask(anchors.mask)
        noisy = self._noisy_queries(targets)
        if noisy is not None:
            denoising = box_cxcywh_to_xyxy(noisy.boxes) * targets.sizes.unsqueeze(1)
            boxes = torch.cat([denoising, boxes], dim=1)
            mask = denoising_mask(noisy.group, anchors.mask)
        queries, found = self._decode(features, boxes, mask)
        logits = torch.cat([queries.logits[None], found.logits])  # the initializer first
        found = Predictions(logits, torch.cat([queries.boxes[None], found.boxes]), found.stage)
        losses = self.criterion.of_anchors(fixed, probed, targets, counts)
        anchored = found.of_proposals(slice(self.denoising_queries, None))
        losses.update(self.criterion.of_detections(anchored, anchors.mask, targets, counts))
        if noisy is not None:
            denoised = found.of_proposals(slice(0, self.denoising_queries))
            assignment = noisy.assignment
            losses.update(self.criterion.of_denoising(denoised, assignment, targets, counts))
        return losses

    def _noisy_queries(self, targets: Targets) -> NoisyQueries | None:
        if not self.denoising_queries:
            return None
        return noisy_queries(objects_of(targets), self.denoising_queries, self.noise)

    def _decode(
        self, features: list[Tensor], boxes: Tensor, mask: Tensor
    ) -> tuple[InitialQueries, Predictions]:
        """Queries at boxes (B, N, 4), and what the decoders make of them."""
        table = self.rois.prepare(features)
        queries = self.initializer(self.rois(table, boxes), boxes, mask)
        return queries, self.decoders(features, table, queries, mask)
