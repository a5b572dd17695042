"""Sparse R-CNN (arXiv 2011.12450): the whole detector.

Letters: ``B`` images, ``P`` proposals, ``Q`` prediction sets.
"""

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor, nn

from ...layers.norm import norms_at_rest
from ...structures import Predictions
from ..decoder import Cascade, DynamicHead
from ..decoder.sqr import RecollectionLog
from ..losses import LossCounts, SetCriterion
from ..matching import Matcher, build_matcher
from ..matching.matcher import AssignmentLog
from ..proposals import ProposalSource, build_proposals
from .base import SparseDetector, image_sizes, pad_targets

__all__ = ["DynamicSparseRCNN", "SparseRCNN", "keep_official_keys"]

# Checkpoints keep the learned proposals at the top level, as officially, and what DPG adds under a
# name of its own; here all of it belongs to one module. Longer prefixes first.
_STORED_NAMES = {
    "proposals.init_proposal_": "init_proposal_",
    "proposals.": "proposal_generator.",
}


def keep_official_keys(model: nn.Module) -> None:
    """Let `model`, whose proposals are ``model.proposals``, save and load under official names."""
    # The public names of the first two exist only since torch 2.5.
    model._register_state_dict_hook(_save_official_keys)
    model._register_load_state_dict_pre_hook(_load_official_keys)
    model.register_load_state_dict_post_hook(_report_official_keys)


def _rename(state: dict[str, Any], old: str, new: str) -> None:
    for key in [k for k in state if k.startswith(old)]:
        state[new + key[len(old) :]] = state.pop(key)


def _save_official_keys(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for own, stored in _STORED_NAMES.items():
        _rename(state, prefix + own, prefix + stored)


def _load_official_keys(state: dict[str, Any], prefix: str, *_: Any) -> None:
    for own, stored in _STORED_NAMES.items():
        _rename(state, prefix + stored, prefix + own)


def _report_official_keys(module: nn.Module, incompatible: Any) -> None:
    for names in (incompatible.missing_keys, incompatible.unexpected_keys):
        for own, stored in _STORED_NAMES.items():
            names[:] = [name.replace(own, stored) for name in names]


@META_ARCH_REGISTRY.register()
class SparseRCNN(SparseDetector):
    """Backbone, proposals, a cascade of stages, set losses; no anchors.

    Suppression of duplicates is for one-to-many assignment only (DLA).
    """

    @configurable
    def __init__(
        self,
        *,
        proposals: ProposalSource,
        head: Cascade,
        matcher: Matcher,
        criterion: SetCriterion,
        assignment_log: AssignmentLog | None = None,
        recollection_log: RecollectionLog | None = None,
        **shared: Any,
    ) -> None:
        """Put the parts together.

        Args:
            proposals: levels and sizes (B, 4) to `Proposals`.
            head: levels and `Proposals` to `Predictions`.
            matcher: `Predictions` and `Targets` to an assignment (Q, B, P).
            criterion: `Predictions`, `Targets` and assignment to a dictionary of losses.
            assignment_log: writes about the assignment into the training log.
            recollection_log: writes the losses of the plain cascade into it, beside all others.
            **shared: see `SparseDetector`.
        """
        super().__init__(**shared)
        self.proposals = proposals
        self.head = head
        self.matcher = matcher
        self.criterion = criterion
        self.assignment_log = assignment_log
        self.recollection_log = recollection_log
        keep_official_keys(self)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read the whole model from a config."""
        return {
            **super().from_config(cfg),
            "proposals": build_proposals(cfg),
            "head": DynamicHead(cfg),
            "matcher": build_matcher(cfg),
            "criterion": SetCriterion(cfg),
            "assignment_log": AssignmentLog.from_config(cfg),
            "recollection_log": RecollectionLog.from_config(cfg),
        }

    @property
    def trains_every_parameter(self) -> bool:
        """Whether losses reach all parameters; several processes must know it."""
        return bool(self.head.deep_supervision) and self.uses_every_level

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
                self.recollection_log(
                    self.criterion,
                    predictions,
                    targets,
                    assignment,
                    normalizers,
                    ends_iteration=ends_iteration,
                )
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
        """See `SparseDetector`."""
        features, sizes, network_sizes = self.extract(inputs)
        return self.head(features, self.proposals(features, sizes)), sizes, network_sizes


@META_ARCH_REGISTRY.register()
class DynamicSparseRCNN(SparseRCNN):
    """The same under the name of its paper (arXiv 2205.02101); its configs enable DLA and DPG."""
