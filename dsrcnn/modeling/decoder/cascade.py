"""The cascade of stages (Sparse R-CNN section 3.3, "iterative structure").

Letters: ``B`` images, ``G`` groups, ``P`` proposals, ``D`` channels, ``C`` classes, ``S`` stages,
``Q`` prediction sets.
"""

import copy
from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from ...layers.activation_checkpoint import checkpointed
from ...layers.roi_align import FeatureTable
from ...structures import Predictions, Proposals
from .rcnn_head import RCNNHead, RoIFeatures
from .sqr import GroupMemory, Window, build_windows, check_windows, plain_windows

__all__ = ["Cascade", "DynamicHead", "Stage"]


class Stage(Protocol):
    """What a cascade needs of a stage, besides being a module that `Cascade._run_stage` runs."""

    def initialize(self, prior_probability: float | None) -> None:
        """Set the parameters of a copy."""


class Cascade(nn.Module):
    """Runs stages one after the other and collects what each of them predicts.

    Subclasses say how a stage reads the pyramid.

    Attributes:
        strides: of the pyramid, finest first.
        recollects: whether `windows` hold in training mode; False: every stage runs plainly.
    """

    strides: tuple[int, ...]
    recollects: bool = True

    def __init__(
        self,
        *,
        stage: nn.Module,
        num_stages: int,
        deep_supervision: bool = True,
        prior_probability: float | None = 0.01,
        checkpoint: bool = False,
        compile_stages: bool = False,
        windows: Sequence[Window] | None = None,
        chunk: int = 0,
        checkpoint_recollection: bool = False,
        detach_init_boxes: bool = True,
    ) -> None:
        """Make `num_stages` copies of `stage`, each with matrices of its own.

        Args:
            stage: a `Stage` to copy; biases therefore start equal in all stages, as officially.
            num_stages: ``S``.
            deep_supervision: False keeps the predictions of the last stage only.
            prior_probability: class score of an untrained model; None with softmax.
            checkpoint: compute the activations of each stage again for the gradient.
            compile_stages: run the stages through ``torch.compile``.
            windows: groups that stages refine in training, see `recollection`; None: plainly.
            chunk: groups a stage refines at once; 0: all.
            checkpoint_recollection: like `checkpoint`, in stages of several groups only.
            detach_init_boxes: initial boxes learn from the first stage only.

        Raises:
            ConfigError: if `windows` are not those of a cascade, see `check_windows`.
        """
        super().__init__()
        self.deep_supervision = deep_supervision
        self.head_series = nn.ModuleList(copy.deepcopy(stage) for _ in range(num_stages))
        for member in self.head_series:
            cast(Stage, member).initialize(prior_probability)
        self.checkpoint = checkpoint
        self.plain_windows = plain_windows(num_stages)
        chosen = self.plain_windows if windows is None else windows
        self.windows = check_windows(chosen, num_stages)
        self.chunk = chunk
        self.checkpoint_recollection = checkpoint_recollection
        self.detach_init_boxes = detach_init_boxes
        if compile_stages:
            for member in self.head_series:
                member.compile()

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        """Read what all cascades share: `MODEL.SparseRCNN`, checkpointing, compilation."""
        node = cfg.MODEL.SparseRCNN
        sqr = node.SQR
        return {
            "num_stages": node.NUM_HEADS,
            "deep_supervision": node.DEEP_SUPERVISION,
            "prior_probability": node.PRIOR_PROB if node.USE_FOCAL else None,
            "checkpoint": cfg.MODEL.CHECKPOINT.STAGES,
            "compile_stages": cfg.MODEL.COMPILE,
            "windows": build_windows(cfg) if sqr.ENABLED else None,
            "chunk": sqr.CHUNK,
            "checkpoint_recollection": sqr.CHECKPOINT,
            "detach_init_boxes": sqr.DETACH_INIT_BOXES,
        }

    def prepare(self, features: list[Tensor]) -> Any:
        """Pyramid levels (B, D, H_l, W_l), laid out once for all stages."""
        raise NotImplementedError

    def _run_stage(
        self, stage: nn.Module, pyramid: Any, boxes: Tensor, states: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError

    def forward(self, features: list[Tensor], proposals: Proposals) -> Predictions:
        """Refine the proposals stage by stage.

        Boxes are detached between stages, features are not: the box loss of a stage trains that
        stage alone, its features all earlier ones. In training a stage may refine several groups
        of proposals at once (`recollection`); groups never see each other.

        Args:
            features: pyramid levels (B, D, H_l, W_l), finest first.
            proposals: initial boxes (B, P, 4) and features (B, P, D).

        Returns:
            The predictions of all stages in order, or of the last one in evaluation mode and
            without deep supervision. Of several groups of a stage, the plain cascade is the last.
        """
        pyramid = self.prepare(features)
        windows = self.windows if self.training and self.recollects else self.plain_windows
        boxes, states = (x.unsqueeze(1) for x in proposals)  # one group: (B, 1, P, .)
        memory = GroupMemory(windows, boxes, states, self.detach_init_boxes)
        collected: list[tuple[Tensor, Tensor]] = []
        for number, stage in enumerate(self.head_series):
            logits, boxes, states = self._refine(stage, pyramid, *memory.window(number))
            collected.append((logits, boxes))
            memory.add(number, boxes, states)
        kept = len(collected) if self.training and self.deep_supervision else 1
        return _as_predictions(collected[-kept:], first_stage=len(collected) - kept)

    def _refine(
        self, stage: nn.Module, pyramid: Any, boxes: Tensor, states: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run a stage on boxes (B, G, P, 4) and features (B, G, P, D), in chunks of groups."""
        groups = boxes.shape[1]
        forgets = self.checkpoint or (self.checkpoint_recollection and groups > 1)
        size = self.chunk or groups
        found = []
        for arguments in zip(boxes.split(size, dim=1), states.split(size, dim=1), strict=True):
            if forgets and torch.is_grad_enabled():
                found.append(checkpointed(stage, self._run_stage, stage, pyramid, *arguments))
            else:
                found.append(self._run_stage(stage, pyramid, *arguments))
        if len(found) == 1:
            return found[0]
        logits, boxes, states = (torch.cat(x, dim=1) for x in zip(*found, strict=True))
        return logits, boxes, states


class DynamicHead(Cascade):
    """The cascade of Sparse R-CNN: every stage pools RoI features at its boxes."""

    @configurable
    def __init__(self, *, stage: RCNNHead, roi_features: RoIFeatures, **kwargs: Any) -> None:
        """Set what pools.

        Args:
            stage: the stage to copy.
            roi_features: pools features at boxes; has no parameters.
            **kwargs: of `Cascade`.
        """
        super().__init__(stage=stage, **kwargs)
        self.roi_features = roi_features
        self.strides = roi_features.strides

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        """Read `MODEL.SparseRCNN` and the pooler's settings."""
        shared = super().from_config(cfg)
        return {**shared, "stage": RCNNHead(cfg), "roi_features": RoIFeatures(cfg)}

    def prepare(self, features: list[Tensor]) -> FeatureTable:
        """Lay the levels out as a table that all stages pool from."""
        return self.roi_features.prepare(features)

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
