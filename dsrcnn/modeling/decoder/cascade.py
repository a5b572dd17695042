"""The cascade of stages (Sparse R-CNN section 3.3, "iterative structure").

Notation: ``G`` groups of proposals.
"""

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from ...layers.activation_checkpoint import checkpointed
from ...layers.roi_align import FeatureTable
from ...structures import Predictions, Proposals
from ...utils.compilation import compile_mode
from .rcnn_head import RCNNHead, RoIFeatures, Stage
from .sqr import GroupMemory, Window, build_windows, plain_windows


class Cascade(nn.Module):
    """Run stages one after the other and collect the predictions of each.

    Subclasses define how a stage reads the pyramid.

    Attributes:
        strides: of the pyramid, finest first.
        refines_boxes: whether a stage starts from the boxes of the one before; False: all start
            from the initial boxes.
    """

    strides: tuple[int, ...]
    refines_boxes: bool = True

    def __init__(
        self,
        *,
        stage: Stage,
        num_stages: int,
        shared_channels: int = 0,
        deep_supervision: bool = True,
        inference_stages: int = 0,
        prior_probability: float | None = 0.01,
        checkpoint: bool = False,
        compile_mode: str = "",
        windows: Sequence[Window] | None = None,
        chunk: int = 0,
        checkpoint_recollection: bool = False,
    ) -> None:
        """Copy `stage` `num_stages` times, each copy with its own initial weight matrices.

        Args:
            stage: the stage to copy; biases therefore start equal in all stages, as officially.
            num_stages: ``S``.
            shared_channels: if above 0, one stage serves as all of them; an embedding of this
                width tells it which one it is, added to the features that enter.
            deep_supervision: False keeps the predictions of the last stage only.
            inference_stages: stages to run in evaluation mode; 0 for all.
            prior_probability: class score of an untrained model; None with softmax.
            checkpoint: recompute the activations of each stage in the backward pass.
            compile_mode: of ``torch.compile`` for the stages; empty: not compiled.
            windows: of SQR, see `build_windows`; None for the plain cascade.
            chunk: groups a stage refines at once; 0 for all.
            checkpoint_recollection: like `checkpoint`, for stages of several groups only.
        """
        super().__init__()
        self.deep_supervision = deep_supervision
        self.inference_stages = inference_stages or num_stages
        self.num_stages = num_stages
        is_shared = shared_channels > 0 and num_stages > 1
        copies = 1 if is_shared else num_stages
        self.head_series = nn.ModuleList(copy.deepcopy(stage) for _ in range(copies))
        if is_shared:
            self.stage_embedding = nn.Embedding(num_stages, shared_channels)
            nn.init.zeros_(self.stage_embedding.weight)  # all stages start alike
        for member in self.head_series:
            cast(Stage, member).initialize(prior_probability)
        self.checkpoint = checkpoint
        self.plain_windows = plain_windows(num_stages)
        self.windows = self.plain_windows if windows is None else tuple(windows)
        self.chunk = chunk
        self.checkpoint_recollection = checkpoint_recollection
        if compile_mode:
            for member in self.head_series:
                member.compile(mode=compile_mode)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read what all cascades share."""
        node = cfg.MODEL.SparseRCNN
        return {
            "num_stages": node.NUM_HEADS,
            "shared_channels": node.HIDDEN_DIM if node.SHARE_STAGES else 0,
            "deep_supervision": node.DEEP_SUPERVISION,
            "inference_stages": node.INFERENCE_STAGES,
            "prior_probability": node.PRIOR_PROB if node.USE_FOCAL else None,
            "checkpoint": "stages" in cfg.MODEL.ACTIVATION_CHECKPOINT,
            "compile_mode": compile_mode(cfg),
            "windows": build_windows(cfg) if node.SQR.ENABLED else None,
            "chunk": node.SQR.CHUNK,
            "checkpoint_recollection": node.SQR.ACTIVATION_CHECKPOINT,
        }

    def prepare(self, features: list[Tensor]) -> Any:
        """Lay out pyramid levels (B, D, H_l, W_l) once for all stages."""
        raise NotImplementedError

    def run_stage(
        self, stage: nn.Module, pyramid: Any, boxes: Tensor, states: Tensor, *, classify: bool
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Refine boxes (B, G, P, 4) and features (B, G, P, D) once.

        Returns:
            Logits, None unless `classify`; boxes; features.
        """
        raise NotImplementedError

    def forward(
        self,
        features: list[Tensor],
        proposals: Proposals,
        *,
        all_stages: bool = False,
        stages: int | None = None,
        recollect: bool = False,
    ) -> Predictions:
        """Refine the proposals stage by stage.

        Boxes are detached between stages, features are not: the box loss of a stage trains that
        stage alone, its features all earlier ones. With recollection a stage refines several groups
        of proposals at once (`sqr`); groups never interact.

        Args:
            features: pyramid levels (B, D, H_l, W_l), finest first.
            proposals: initial boxes (B, P, 4) and features (B, P, D).
            all_stages: return all stages in evaluation mode or without deep supervision, too.
            stages: to run in evaluation mode; None for `inference_stages`.
            recollect: refine the groups of `windows`; False runs the plain cascade.

        Returns:
            The predictions of all stages in order, or of the last one (of `inference_stages`) in
            evaluation mode and without deep supervision. Of the groups of a stage the plain cascade
            is the last.
        """
        pyramid = self.prepare(features)
        windows = self.windows if recollect else self.plain_windows
        boxes, states = (x.unsqueeze(1) for x in proposals)  # one group: (B, 1, P, .)
        memory = GroupMemory(windows, boxes, states, detach=self.refines_boxes)
        exit_early = not (self.training or all_stages)
        used = (stages or self.inference_stages) if exit_early else self.num_stages
        keep_all = all_stages or (self.training and self.deep_supervision)
        outputs: list[_Output] = []
        for number in range(used):
            # The classes of a stage matter to its own prediction only.
            is_kept = keep_all or number == used - 1
            before, states = memory.window(number)
            states = self._name_stage(number, states)
            arguments = (self.stages[number], pyramid, before, states)
            logits, boxes, states = self._refine(*arguments, classify=is_kept)
            if logits is not None:
                outputs.append(_Output(number, logits, boxes))
            memory.add(number, boxes if self.refines_boxes else before, states)
        return _stack(outputs)

    @property
    def stages(self) -> list[nn.Module]:
        """Stages in the order in which they run, ``S`` of them; shared ones repeat."""
        members = list(self.head_series)
        return members * (self.num_stages // len(members))

    def _name_stage(self, number: int, states: Tensor) -> Tensor:
        """Add the embedding of a shared stage to the features (B, G, P, D) that enter it."""
        if len(self.head_series) == self.num_stages:
            return states
        return states + self.stage_embedding.weight[number]

    def _refine(
        self, stage: nn.Module, pyramid: Any, boxes: Tensor, states: Tensor, *, classify: bool
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Run a stage in chunks of groups."""
        groups = boxes.shape[1]
        recompute = self.checkpoint or (self.checkpoint_recollection and groups > 1)
        size = self.chunk or groups
        run = partial(self.run_stage, classify=classify)
        chunks = []
        for arguments in zip(boxes.split(size, dim=1), states.split(size, dim=1), strict=True):
            if recompute and torch.is_grad_enabled():
                chunks.append(checkpointed(stage, run, stage, pyramid, *arguments))
            else:
                chunks.append(run(stage, pyramid, *arguments))
        if len(chunks) == 1:
            return chunks[0]
        parts, *rest = zip(*chunks, strict=True)
        logits = torch.cat(parts, dim=1) if classify else None
        boxes, states = (torch.cat(x, dim=1) for x in rest)
        return logits, boxes, states


class _Output(NamedTuple):
    """Logits (B, G, P, C) and boxes (B, G, P, 4) of a stage."""

    stage: int
    logits: Tensor
    boxes: Tensor


class DynamicHead(Cascade):
    """The cascade of Sparse R-CNN: every stage pools RoI features at its boxes."""

    @configurable
    def __init__(
        self, *, stage: RCNNHead, roi_features: RoIFeatures, compile_mode: str = "", **kwargs: Any
    ) -> None:
        """Add pooling at boxes to a cascade; other arguments are those of `Cascade`."""
        super().__init__(stage=stage, compile_mode=compile_mode, **kwargs)
        self.roi_features = roi_features
        self.strides = roi_features.strides
        if compile_mode:
            roi_features.compile(mode=compile_mode)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read `MODEL.SparseRCNN` and the settings of the pooler."""
        shared = super().from_config(cfg)
        return {**shared, "stage": RCNNHead(cfg), "roi_features": RoIFeatures(cfg)}

    def prepare(self, features: list[Tensor]) -> FeatureTable:
        """Lay the levels out as the table that all stages pool from."""
        return self.roi_features.prepare(features)

    def run_stage(
        self,
        stage: nn.Module,
        pyramid: FeatureTable,
        boxes: Tensor,
        states: Tensor,
        *,
        classify: bool,
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Pool RoI features at the boxes and refine them."""
        pooled = self.roi_features(pyramid, boxes.detach().flatten(1, 2))
        return stage(pooled, boxes, states, classify=classify)


def _stack(outputs: list[_Output]) -> Predictions:
    """Stack (B, G, P, .) outputs; every group of a stage becomes a prediction set."""
    logits = [x.logits.transpose(0, 1) for x in outputs]
    boxes = [x.boxes.transpose(0, 1) for x in outputs]
    device = boxes[0].device
    stages = [
        torch.full((len(b),), x.stage, device=device) for x, b in zip(outputs, boxes, strict=True)
    ]
    if len(outputs) == 1:
        return Predictions(logits[0], boxes[0], stages[0])
    return Predictions(torch.cat(logits), torch.cat(boxes), torch.cat(stages))
