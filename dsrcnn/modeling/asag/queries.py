"""From anchors to predictions: initial queries, denoising queries, and the decoders.

ASAG, arXiv 2308.09242, section 3.3. Notation: ``N`` anchors, ``n`` denoising queries (in
training), ``P = n + N`` queries, denoising ones first.
"""

import copy
import logging
from typing import Any, ClassVar, NamedTuple, cast

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from ...errors import ConfigError
from ...layers.point_sampling import GroupedPyramid
from ...layers.roi_align import FeatureTable
from ...structures import Predictions
from ..decoder import (
    AdaMixerStage,
    PositionalStage,
    RCNNHead,
    RoIFeatures,
    Stage,
    StageSettings,
    stride_of,
)
from ..decoder.adamixer import UNUSED_KEYS
from .patches import RelativeTargets

_LOGGER = logging.getLogger(__name__)

# Where the published code differs from AdaMixer's, for `PositionalStage`.
STAGE_OPTIONS: dict[str, Any] = {"tower_bias": False, "unit": 4.0, "ratio_scale": 0.5}


class InitialQueries(NamedTuple):
    """Input of the decoders.

    Attributes:
        logits: (B, P, C) of a first prediction, for its loss.
        boxes: (B, P, 4) xyxy in pixels, of the same.
        features: (B, P, D).
    """

    logits: Tensor
    boxes: Tensor
    features: Tensor


class QueryInitializer(PositionalStage):
    """RoI features, then a `PositionalStage`: attention, feed-forward network, class and box."""

    @configurable
    def __init__(
        self, *, settings: StageSettings, roi_positions: int, prior_probability: float
    ) -> None:
        """Build the layers; `prior_probability` is the class score of an untrained model."""
        super().__init__(settings, **STAGE_OPTIONS)
        self.roi = nn.Linear(settings.channels * roi_positions, settings.channels)
        self.roi_norm = nn.LayerNorm(settings.channels)
        self.initialize(prior_probability)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read `MODEL.SparseRCNN` and the resolution of the pooler."""
        return {
            "settings": StageSettings.from_config(cfg),
            "roi_positions": cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION**2,
            "prior_probability": cfg.MODEL.SparseRCNN.PRIOR_PROB,
        }

    def forward(self, rois: Tensor, boxes: Tensor, mask: Tensor | None = None) -> InitialQueries:
        """Turn anchors into queries.

        Args:
            rois: (B * P, K, D) features of the anchors in K RoI cells.
            boxes: (B, P, 4) anchors, xyxy in pixels.
            mask: (B, P) or (B, P, P) bool, False for what must not be attended to.
        """
        features = self.roi_norm(self.roi(rois.transpose(1, 2).flatten(1)))
        features = features.view(*boxes.shape[:2], -1)
        xyzr = self.positions(boxes)
        features = self.attention(features, xyzr, boxes, mask)  # residual and norm included
        boxes, features = self.feed_forward_and_move(features, xyzr)
        return InitialQueries(self.classify(features), boxes, features)


class NoisyQueries(NamedTuple):
    """Noised ground-truth boxes to reconstruct; their features are read at them, as at anchors.

    Attributes:
        boxes: (B, n, 4) cxcywh as fractions of the image; in the padding the whole image.
        assignment: (B, n) int64 index of the ground truth, -1 in the padding.
        group: (B, n) int64 index of the repetition, -1 in the padding.
    """

    boxes: Tensor
    assignment: Tensor
    group: Tensor


_NOISE = 0.4  # relative: of half the box for centers, of the box for sides; as published


def noisy_queries(targets: RelativeTargets, count: int) -> NoisyQueries:
    """Repeat the ground truths of every image as often as they fit into `count` (``n``) queries.

    An image with more ground truths, or none, has padding only.
    """
    images, device = len(targets.mask), targets.mask.device
    number = targets.mask.sum(dim=1, keepdim=True)
    slot = torch.arange(count, device=device).expand(images, -1)
    index, group = slot % number.clamp(min=1), slot // number.clamp(min=1)
    # Ground truths come before their padding; a last, incomplete repetition is left out.
    real = (number > 0) & (group < count // number.clamp(min=1))
    whole = targets.boxes.new_tensor([0.5, 0.5, 1.0, 1.0])
    if not targets.mask.shape[1]:
        boxes = whole.expand(images, count, 4)
    else:
        clean = targets.boxes.take_along_dim(index.unsqueeze(-1), dim=1)
        reach = torch.cat([clean[..., 2:] / 2, clean[..., 2:]], dim=-1) * _NOISE
        moved = (clean + (2 * torch.rand_like(clean) - 1) * reach).clamp(0, 1)
        boxes = torch.where(real.unsqueeze(-1), moved, whole)
    return NoisyQueries(boxes, index.masked_fill(~real, -1), group.masked_fill(~real, -1))


def attention_mask(valid: Tensor, group: Tensor | None = None) -> Tensor:
    """Hide padding from all queries, and denoising queries from anchors and other repetitions.

    All queries attend to `valid` anchors, denoising ones, which come first, also to their
    repetition. Padded anchors attend to all anchors, for a row without keys would be NaN.

    Args:
        valid: (B, N) bool, False for padded anchors.
        group: (B, n) repetition of each denoising query, see `NoisyQueries`; None for no such.

    Returns:
        (B, P, P) bool, True where the query of the row attends to that of the column.
    """
    anchors = valid.unsqueeze(1) | ~valid.unsqueeze(2)
    if group is None:
        return anchors
    same = group.unsqueeze(2) == group.unsqueeze(1)
    above = torch.cat([same, valid.unsqueeze(1).expand(-1, group.shape[1], -1)], dim=2)
    hidden = torch.zeros_like(above[..., group.shape[1] :].transpose(1, 2))
    below = torch.cat([hidden, anchors], dim=2)
    return torch.cat([above, below], dim=1)


def keep_decoder(
    state: dict[str, Tensor], index: int, prefix: str = "decoders."
) -> dict[str, Tensor]:
    """Reduce weights by name to one of several decoders, from 0 on."""
    embedding, stages = f"{prefix}decoder_embedding.weight", f"{prefix}stages."
    own = f"{stages}{index}."
    kept = {k: v for k, v in state.items() if not k.startswith(stages)}
    kept |= {f"{stages}0.{k.removeprefix(own)}": v for k, v in state.items() if k.startswith(own)}
    return {**kept, embedding: state[embedding][index : index + 1].clone()}


class ParallelDecoders(nn.Module):
    """Stages that refine the same queries, each with a learned vector added to the features.

    Attributes:
        pooler: pools RoI features, for the initializer, too; its strides are those of the pyramid.
        unused_keys: config keys without effect, and their defaults.
    """

    unused_keys: ClassVar[dict[str, Any]] = {}

    @configurable
    def __init__(
        self,
        *,
        stage: Stage,
        channels: int,
        pooler: RoIFeatures,
        count: int,
        used: int,
        prior_probability: float,
    ) -> None:
        """Copy `stage` `count` times; `used` is the index of the copy inference uses.

        With a single copy it is the index in weights of several, see `select_weights`.
        """
        super().__init__()
        self.stages = nn.ModuleList(copy.deepcopy(stage) for _ in range(count))
        self.decoder_embedding = nn.Embedding(count, channels)
        self.pooler = pooler
        self.used, self.used_of_several = used % count, used
        for member in self.stages:
            cast(Stage, member).initialize(prior_probability)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read `MODEL.ASAG`, `MODEL.SparseRCNN` and the pooler.

        Raises:
            ConfigError: for another RoIAlign or other levels than ASAG's.
        """
        node, box_head = cfg.MODEL.ASAG, cfg.MODEL.ROI_BOX_HEAD
        if box_head.POOLER_TYPE != "ROIAlign":
            raise ConfigError(
                f"MODEL.ROI_BOX_HEAD.POOLER_TYPE is {box_head.POOLER_TYPE!r}; ASAG pools with "
                "'ROIAlign' (not aligned). Write MODEL.ROI_BOX_HEAD.POOLER_TYPE ROIAlign."
            )
        names = list(cfg.MODEL.ROI_HEADS.IN_FEATURES)
        strides = tuple(stride_of(name) for name in names)
        if strides != (4, 8, 16, 32):
            raise ConfigError(
                f"MODEL.ROI_HEADS.IN_FEATURES is {names}; ASAG probes p3 to p5 and samples p2 to "
                "p5. Write [p2, p3, p4, p5]."
            )
        resolution, samples = box_head.POOLER_RESOLUTION, box_head.POOLER_SAMPLING_RATIO
        pooler = RoIFeatures(strides=strides, resolution=resolution, samples=samples, aligned=False)
        return {
            "channels": cfg.MODEL.SparseRCNN.HIDDEN_DIM,
            "pooler": pooler,
            "count": node.NUM_DECODERS,
            "used": node.USED_HEAD,
            "prior_probability": cfg.MODEL.SparseRCNN.PRIOR_PROB,
        }

    def select_weights(self, state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
        """Keep the decoder to use of weights with several, if this has a single one.

        Args:
            state: weights by name.
            prefix: of the names of this module.
        """
        rows = state.get(f"{prefix}decoder_embedding.weight")
        count, used = 0 if rows is None else len(rows), self.used_of_several
        if len(self.stages) > 1 or count < 2 or not -count <= used < count:
            return state
        index = used % count
        _LOGGER.info("Of %d decoders in the file, decoder %d is loaded.", count, index)
        return keep_decoder(state, index, prefix)

    def stage_input(self, features: list[Tensor], table: FeatureTable, boxes: Tensor) -> Any:
        """Compute once what all stages take beside queries at boxes (B, P, 4)."""
        raise NotImplementedError

    def forward(
        self,
        features: list[Tensor],
        table: FeatureTable,
        queries: InitialQueries,
        mask: Tensor | None = None,
    ) -> Predictions:
        """Refine the queries once.

        Args:
            features: pyramid levels (B, D, H_l, W_l), finest first.
            table: the same levels, prepared by `pooler`.
            queries: no gradient reaches their boxes.
            mask: (B, P) or (B, P, P) bool, False for what must not be attended to.

        Returns:
            A prediction set of every decoder in training, of the used one otherwise; ``stage`` is
            the index of the decoder.
        """
        order = list(range(len(self.stages))) if self.training else [self.used]
        boxes = queries.boxes.detach()
        shared = self.stage_input(features, table, boxes)
        boxes = boxes.unsqueeze(1)  # stages take (B, G, P, .); here one group
        outputs = []
        for index in order:
            states = (queries.features + self.decoder_embedding.weight[index]).unsqueeze(1)
            outputs.append(self.stages[index](shared, boxes, states, mask)[:2])
        logits, refined = (torch.cat(x, dim=1).transpose(0, 1) for x in zip(*outputs, strict=True))
        return Predictions(logits, refined, torch.tensor(order, device=boxes.device))


class AdaMixerDecoders(ParallelDecoders):
    """The decoders of ASAG-A: stages of AdaMixer, with other towers and positions."""

    unused_keys = UNUSED_KEYS

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read `MODEL.AdaMixer`, and the towers of `MODEL.SparseRCNN`."""
        arguments = {**AdaMixerStage.from_config(cfg), "settings": StageSettings.from_config(cfg)}
        stage = AdaMixerStage(**arguments, **STAGE_OPTIONS, grid=False)
        return {**super().from_config(cfg), "stage": stage}

    def stage_input(self, features: list[Tensor], *_: Any) -> GroupedPyramid:
        """Split the channels of the pyramid into groups, which the stages sample."""
        groups = cast(AdaMixerStage, self.stages[0]).groups
        return GroupedPyramid.from_levels(features, self.pooler.strides, groups)


class RCNNDecoders(ParallelDecoders):
    """The decoders of ASAG-S: stages of Sparse R-CNN, with ``ACTIVATION`` in the towers, too."""

    @configurable
    def __init__(self, **kwargs: Any) -> None:
        """Let boxes start where the query initializer puts them, as AdaMixer's stages do."""
        super().__init__(**kwargs)
        for stage in self.stages:
            for parameter in cast(RCNNHead, stage).bboxes_delta.parameters():
                nn.init.zeros_(parameter)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read `MODEL.SparseRCNN`."""
        activation = cfg.MODEL.SparseRCNN.ACTIVATION
        stage = RCNNHead(**RCNNHead.from_config(cfg), tower_activation=activation)
        return {**super().from_config(cfg), "stage": stage}

    def stage_input(self, features: list[Tensor], table: FeatureTable, boxes: Tensor) -> Tensor:
        """Pool RoI features (B * P, K, D)."""
        rois: Tensor = self.pooler(table, boxes)
        return rois


# By MODEL.ASAG.DECODER
DECODERS = {"AdaMixer": AdaMixerDecoders, "SparseRCNN": RCNNDecoders}
