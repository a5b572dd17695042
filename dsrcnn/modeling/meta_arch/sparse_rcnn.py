"""Sparse R-CNN (arXiv 2011.12450): the whole detector."""

from collections.abc import Hashable
from typing import Any, ClassVar, NamedTuple

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor, nn

from ...config.validate import check_cascade
from ...layers.norm import preserve_bn_stats
from ...structures import Predictions, Targets
from ...utils.training import iteration_ends, training_context
from ..decoder.cascade import Cascade, DynamicHead
from ..losses.criterion import LossNormalizers, SetCriterion
from ..matching.matcher import Matcher, build_matcher
from ..proposals.build import ProposalSource, build_proposals, check_config_of_source
from .base import ImageBatch, SparseDetector, size_tensor


class CascadeNormalizers(NamedTuple):
    """Divisors of losses.

    Attributes:
        stages: of the stages.
        candidates: of what the proposals were selected from.
    """

    stages: LossNormalizers | None = None
    candidates: Any = None


@META_ARCH_REGISTRY.register()
class SparseRCNN(SparseDetector):
    """Learned proposals, refined by a cascade of stages and trained with a set loss.

    There are no anchors, and NMS only with one-to-many assignment (DLA).

    Attributes:
        default_proposals: name in ``PROPOSALS_REGISTRY`` for an empty ``PROPOSALS.NAME``.
        takes_queries: see `ProposalSource.gives_queries`.
    """

    default_proposals: ClassVar[str] = "LearnedProposals"
    takes_queries: ClassVar[bool] = False

    @configurable
    def __init__(
        self,
        *,
        proposals: ProposalSource,
        head: Cascade,
        matcher: Matcher,
        criterion: SetCriterion,
        **shared: Any,
    ) -> None:
        """Assemble the detector.

        Args:
            proposals: levels and sizes (B, 4) to `Proposals`.
            head: levels and `Proposals` to `Predictions`.
            matcher: `Predictions` and `Targets` to an assignment (Q, B, P).
            criterion: `Predictions`, `Targets` and assignment to a dictionary of losses.
            **shared: see `SparseDetector`.
        """
        super().__init__(**shared)
        self.proposals = proposals
        self.head = head
        self.matcher = matcher
        self.criterion = criterion
        _use_official_keys(self)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read the whole model from a config."""
        return {
            **super().from_config(cfg),
            "proposals": build_proposals(cfg, cls.default_proposals),
            "head": DynamicHead(cfg),
            "matcher": build_matcher(cfg),
            "criterion": SetCriterion(cfg),
        }

    @classmethod
    def check_config(cls, cfg: CfgNode) -> None:
        """Check the keys of sparse detectors and of cascades."""
        super().check_config(cfg)
        check_cascade(cfg)
        check_config_of_source(cfg, takes_queries=cls.takes_queries)

    @property
    def all_parameters_get_gradients(self) -> bool:
        """Whether every level and every stage has a loss."""
        return bool(self.head.deep_supervision) and super().all_parameters_get_gradients

    def forward(
        self, batched_inputs: list[dict[str, Any]]
    ) -> dict[str, Tensor] | list[dict[str, Any]]:
        """Compute losses in training mode, detections otherwise.

        Args:
            batched_inputs: Detectron2's model inputs: ``image`` (3, H, W) in the order of
                ``INPUT.FORMAT``; ``instances`` with ``gt_boxes`` and ``gt_classes`` in training;
                ``height`` and ``width`` of the original image otherwise.

        Returns:
            The weighted losses by name in training, otherwise one dictionary per image with
            ``instances``: ``pred_boxes`` in pixels of the original image, ``scores``,
            ``pred_classes``.
        """
        if not self.training:
            return self.inference(batched_inputs)
        predictions, images = self.raw_predictions(batched_inputs)
        targets = Targets.from_inputs(batched_inputs, images.sizes)
        losses = self.losses(predictions, targets, training_context().normalizers)
        if iteration_ends():
            self.proposals.end_iteration()
        return losses

    def losses(
        self, predictions: Predictions, targets: Targets, normalizers: Any
    ) -> dict[str, Tensor]:
        """Compute the weighted losses by name.

        Args:
            predictions: of all stages; with candidates, these have the losses of their source.
            targets: ground truth of the batch.
            normalizers: from `loss_normalizers`; None for those of this batch.
        """
        divisors = normalizers or CascadeNormalizers()
        assignment = self.matcher(predictions, targets)
        losses: dict[str, Tensor] = self.criterion(
            predictions, targets, assignment, divisors.stages
        )
        if predictions.candidates is not None:
            losses |= self.proposals.losses(predictions.candidates, targets, divisors.candidates)
        return losses

    @torch.no_grad()
    def loss_normalizers(self, parts: list[list[dict[str, Any]]]) -> CascadeNormalizers:
        """Return the loss normalizers of a batch that is processed in parts.

        If losses are divided by positives, every part must be matched beforehand, which takes a
        second forward pass; without DLA the ground truth is enough.
        """
        criterion = self.criterion
        counts, targets = [], []
        with preserve_bn_stats(self):
            for inputs in parts:
                sizes = [x["instances"].image_size for x in inputs]
                targets.append(Targets.from_inputs(inputs, size_tensor(sizes, self.device)))
                assignment = None
                if not criterion.counts_targets_only:
                    predictions, _ = self.raw_predictions(inputs)
                    assignment = self.matcher(predictions, targets[-1])
                counts.append(criterion.count(targets[-1], assignment))
        return CascadeNormalizers(
            criterion.normalizers(counts), self.proposals.loss_normalizers(targets)
        )

    def predict(
        self, images: ImageBatch, *, all_stages: bool = False, stages: int | None = None
    ) -> Predictions:
        """Run the network on images; see `SparseDetector`.

        `stages` is the number of stages to run in evaluation mode; None for the config's.
        """
        features = self.encode(images)
        proposals, candidates = self.proposals.propose(features, images.sizes)
        recollect = self.training and training_context().recollect
        options = {"all_stages": all_stages, "stages": stages, "recollect": recollect}
        predictions: Predictions = self.head(features, proposals, **options)
        return predictions._replace(candidates=candidates) if self.training else predictions

    def encode(self, images: ImageBatch) -> Any:
        """Compute what proposals and cascade read."""
        return self.encode_features(self.extract_features(images), images)

    def encode_features(self, features: list[Tensor], images: ImageBatch) -> Any:
        """Prepare pyramid levels (B, D, H_l, W_l) for proposals and cascade; here as they are."""
        return features

    def graph_key(self) -> Hashable:
        """Add the number of stages; see `SparseDetector`."""
        return super().graph_key(), self.head.inference_stages


@META_ARCH_REGISTRY.register()
class DynamicSparseRCNN(SparseRCNN):
    """`SparseRCNN` under the name of arXiv 2205.02101; its configs enable DLA and DPG."""


# Official checkpoints have the learned proposals at the top level, and what DPG adds is stored
# beside them; in the model all of it belongs to one module. Longer prefixes first.
_STORED_NAMES = {"proposals.init_proposal_": "init_proposal_", "proposals.": "proposal_generator."}


def _use_official_keys(model: nn.Module) -> None:
    """Let `model`, with its proposals in ``model.proposals``, save and load official keys."""
    # The public names of the first two exist only since torch 2.5.
    model._register_state_dict_hook(_save_official_keys)
    model._register_load_state_dict_pre_hook(_load_official_keys)
    model.register_load_state_dict_post_hook(_report_official_keys)


def _rename(state: dict[str, Any], old: str, new: str) -> None:
    for key in [k for k in state if k.startswith(old)]:
        state[new + key[len(old) :]] = state.pop(key)


def _save_official_keys(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name, stored in _STORED_NAMES.items():
        _rename(state, prefix + name, prefix + stored)


def _load_official_keys(state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, stored in _STORED_NAMES.items():
        _rename(state, prefix + stored, prefix + name)


def _report_official_keys(module: nn.Module, incompatible: Any) -> None:
    for names in (incompatible.missing_keys, incompatible.unexpected_keys):
        for name, stored in _STORED_NAMES.items():
            names[:] = [key.replace(name, stored) for key in names]
