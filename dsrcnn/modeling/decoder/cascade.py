"""The cascade of stages (Sparse R-CNN section 3.3, "iterative structure").

Letters: ``B`` images, ``G`` groups, ``P`` proposals, ``D`` channels, ``C`` classes, ``S`` stages,
``Q`` prediction sets.
"""

import copy
from typing import cast

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from ...layers.activation_checkpoint import checkpointed
from ...layers.roi_align import FeatureTable
from ...structures import Predictions, Proposals
from .roi_features import RoIFeatures
from .sparse_stage import RCNNHead

__all__ = ["DynamicHead"]


class DynamicHead(nn.Module):
    """Runs the stages one after the other and collects what each of them predicts."""

    @configurable
    def __init__(
        self,
        *,
        stage: RCNNHead,
        num_stages: int,
        roi_features: RoIFeatures,
        deep_supervision: bool = True,
        prior_probability: float | None = 0.01,
        checkpoint: bool = False,
        compile_stages: bool = False,
    ) -> None:
        """Make `num_stages` copies of `stage`, each with matrices of its own.

        Args:
            stage: the stage to copy; biases therefore start equal in all stages, as officially.
            num_stages: ``S``.
            roi_features: pools features at boxes; has no parameters.
            deep_supervision: False keeps the predictions of the last stage only.
            prior_probability: see `RCNNHead.initialize`.
            checkpoint: compute the activations of each stage again for the gradient.
            compile_stages: run the stages through ``torch.compile``.
        """
        super().__init__()
        self.roi_features = roi_features
        self.deep_supervision = deep_supervision
        self.head_series = nn.ModuleList(copy.deepcopy(stage) for _ in range(num_stages))
        for member in self.head_series:
            cast(RCNNHead, member).initialize(prior_probability)
        self.checkpoint = checkpoint
        if compile_stages:
            for member in self.head_series:
                member.compile()

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        """Read `MODEL.SparseRCNN` and the pooler's settings."""
        node = cfg.MODEL.SparseRCNN
        return {
            "stage": RCNNHead(cfg),
            "num_stages": node.NUM_HEADS,
            "roi_features": RoIFeatures(cfg),
            "deep_supervision": node.DEEP_SUPERVISION,
            "prior_probability": node.PRIOR_PROB if node.USE_FOCAL else None,
            "checkpoint": cfg.MODEL.CHECKPOINT.STAGES,
            "compile_stages": cfg.MODEL.COMPILE,
        }

    def forward(self, features: list[Tensor], proposals: Proposals) -> Predictions:
        """Refine the proposals stage by stage.

        Boxes are detached between stages, features are not: the box loss of a stage trains that
        stage alone, its features all earlier ones.

        Args:
            features: pyramid levels (B, D, H_l, W_l), finest first.
            proposals: initial boxes (B, P, 4) and features (B, P, D).

        Returns:
            The predictions of all stages in order, or of the last one in evaluation mode and
            without deep supervision.
        """
        pyramid = self.roi_features.prepare(features)
        boxes, states = (x.unsqueeze(1) for x in proposals)  # one group: (B, 1, P, .)
        collected: list[tuple[Tensor, Tensor]] = []
        for stage in self.head_series:
            arguments = (stage, pyramid, boxes, states)
            if self.checkpoint and torch.is_grad_enabled():
                logits, boxes, states = checkpointed(stage, self._run_stage, *arguments)
            else:
                logits, boxes, states = self._run_stage(*arguments)
            collected.append((logits, boxes))
            boxes = boxes.detach()
        kept = len(collected) if self.training and self.deep_supervision else 1
        return _as_predictions(collected[-kept:], first_stage=len(collected) - kept)

    def _run_stage(
        self, stage: nn.Module, pyramid: FeatureTable, boxes: Tensor, states: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        pooled = self.roi_features(pyramid, boxes.detach().flatten(1, 2))
        return stage(pooled, boxes, states)


def _as_predictions(collected: list[tuple[Tensor, Tensor]], first_stage: int) -> Predictions:
    """Stack (B, G, P, .) outputs; every group of a stage becomes a prediction set of its own."""
    logits, boxes = (
        torch.cat([x.transpose(0, 1) for x in xs]) for xs in zip(*collected, strict=True)
    )
    stages = [
        torch.full((b.shape[1],), first_stage + i, device=b.device)
        for i, (_, b) in enumerate(collected)
    ]
    return Predictions(logits, boxes, torch.cat(stages))
