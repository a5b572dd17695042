"""ASAG's anchors: predicted on patches of the image, few where few are needed.

Adaptive Sparse Anchor Generation, arXiv 2308.09242, section 3.2. Notation: ``N`` anchors of an
image (padded), ``T`` anchors of all images together, ``m`` probed patches, ``A`` anchors per patch,
``K`` cells per side and ``C`` channels of a patch.
"""

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from ...layers.blocks import initialize_xavier
from .patches import (
    CELLS,
    PatchCompressor,
    TrainingPatches,
    crop_positions,
    from_patches,
    patch_nms,
    rank_in_group,
    resize_valid,
)

NUM_PROBED_LEVELS = {"P5P6": 0, "P4P6": 1, "P3P6": 2}  # by MODEL.ASAG.ANCHORS.INFERENCE_LEVEL

_STRIDES = (8, 16, 32)  # of P3, P4 and P5, in the order of their compressors
# Level (and compressor) and stride: P4, then P3. Levels are counted from the finest; steps (norms,
# position embeddings, outputs) from the coarsest: 0 is P5 and P6, 1 is P4, 2 is P3.
_PROBED = ((1, 16), (0, 8))
_COMPRESSED = 8  # channels of a patch, as published
_MIN_SIDE = 3.0  # pixels; smaller anchors get the score 0, as published


class ProbingRule(NamedTuple):
    """Which anchors are probed on a finer level, and which are output.

    Attributes:
        low: lower limit of the location scores of anchors that are probed.
        high: upper limit of them.
        output: minimum location score of an output anchor.
        least: minimum number of anchors of an image, from the fixed levels whatever their scores.
        most: maximum number of anchors of an image.
        max_patches: per image and level; 0 for no limit.
        levels: number of probed levels: 2 for P4 and P3, 1 for P4, or 0.
    """

    low: float = 0.1
    high: float = 0.7
    output: float = 0.1
    least: int = 5
    most: int = 200
    max_patches: int = 0
    levels: int = 2


class FixedLevels(NamedTuple):
    """Predictions that every image has.

    Attributes:
        quarters: (B, 4, A, 5) on P5, row by row: cxcywh relative to the quarter, location logit.
        whole: (B, 1 or 4, A, 5) on P6, of the image; in training then flipped in x, y and both.
    """

    quarters: Tensor
    whole: Tensor


class ProbedLevel(NamedTuple):
    """Predictions on the probed patches of a level.

    Attributes:
        predictions: (m, A, 5) cxcywh relative to the patch, location logit.
        images: (m,) int64 image of each patch.
        positions: (m, 2) upper left cell, x and y.
        stride: of the level.
        train_only: (m,) bool, True for patches that have losses but whose anchors are not output.
    """

    predictions: Tensor
    images: Tensor
    positions: Tensor
    stride: int
    train_only: Tensor


class Anchors(NamedTuple):
    """Anchors of a batch, padded.

    Attributes:
        boxes: (B, N, 4) cxcywh in pixels; in the padding the whole image.
        scores: (B, N) location scores, 0 in the padding.
        mask: (B, N) bool, False in the padding.
        level: (B, N) int64 pyramid level: 5 for P5 and P6, 4, or 3; 0 in the padding.
    """

    boxes: Tensor
    scores: Tensor
    mask: Tensor
    level: Tensor


def anchor_statistics(anchors: Anchors, probed: list[ProbedLevel]) -> dict[str, Tensor]:
    """Compute means over images to log: anchors, best location score, patches by level."""
    images, scores = len(anchors.mask), anchors.scores.amax(dim=1)
    statistics = {"anchors": anchors.mask.sum() / images, "location_score": scores.mean()}
    for level in probed:
        name = f"patches_p{level.stride.bit_length() - 1}"
        statistics[name] = (~level.train_only).sum() / images
    return statistics


class _Candidates(NamedTuple):
    """Anchors of a level, of all images: (T, 4) cxcywh in pixels, (T,) scores, (T,) images."""

    boxes: Tensor
    scores: Tensor
    images: Tensor

    def select(self, keep: Tensor) -> "_Candidates":
        return _Candidates(*(x[keep] for x in self))


class AnchorGenerator(nn.Module):
    """Fixed levels P6 and P5, and adaptive probing of P4 and P3.

    Parameter names follow the published checkpoints. Their code draws the initial affine parameters
    of the norms like weights, by mistake; here they start as ones and zeros.
    """

    @configurable
    def __init__(
        self,
        *,
        channels: int,
        hidden: int,
        fixed_anchors: int,
        probed_anchors: int,
        rule: ProbingRule,
    ) -> None:
        """Build the layers for a pyramid of `channels`; `hidden` is the width of the predictors.

        Anchors are per patch: fixed ones of P5 and P6, probed ones of P4 and P3.
        """
        super().__init__()
        self.rule = rule
        self.compress = nn.ModuleList(PatchCompressor(channels, _COMPRESSED) for _ in _STRIDES)
        self.P6 = nn.Conv2d(_COMPRESSED, _COMPRESSED, 3, stride=2, padding=2, dilation=2)
        shape = (CELLS * CELLS, _COMPRESSED)
        # One for P5 and P6, one for P4, one for P3.
        self.layernorm = nn.ModuleList(nn.LayerNorm(shape) for _ in range(3))
        self.pos_embedding = nn.ModuleList(nn.Embedding(*shape) for _ in range(3))
        flat = shape[0] * shape[1]
        self.proj_all = _MLP(flat, hidden, 5 * fixed_anchors)
        self.proj_patch = _MLP(flat, hidden, 5 * probed_anchors)
        initialize_xavier(self)
        for norm in self.layernorm:
            cast(nn.LayerNorm, norm).reset_parameters()

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read `MODEL.ASAG.ANCHORS`."""
        node = cfg.MODEL.ASAG.ANCHORS
        thresholds, limits = (node.LOW, node.HIGH, node.OUTPUT), (node.MIN, node.MAX)
        levels = NUM_PROBED_LEVELS[node.INFERENCE_LEVEL]
        rule = ProbingRule(*thresholds, *limits, node.MAX_PATCHES, levels)
        return {
            "channels": cfg.MODEL.FPN.OUT_CHANNELS,
            "hidden": node.HIDDEN,
            "fixed_anchors": node.FIXED,
            "probed_anchors": node.PROBED,
            "rule": rule,
        }

    @property
    def probes_every_level(self) -> bool:
        """Whether P4 and P3 are both probed; otherwise some parameters get no gradient."""
        return self.rule.levels == len(_PROBED)

    def forward(
        self, features: list[Tensor], sizes: Tensor, training_patches: TrainingPatches | None = None
    ) -> tuple[Anchors, FixedLevels, list[ProbedLevel]]:
        """Generate the anchors of a batch.

        Args:
            features: P3, P4 and P5, (B, D, H_l, W_l).
            sizes: (B, 4) ``w, h, w, h`` of each image in pixels.
            training_patches: additional patches in training.

        Returns:
            Anchors without gradient; predictions with it, of the fixed and of the probed levels.
        """
        fixed = self._predict_fixed(features[2], sizes)
        with torch.no_grad():
            current = self._fixed_candidates(fixed, sizes)
        outputs: list[_Candidates] = []
        probed: list[ProbedLevel] = []
        for index, stride in _PROBED[: self.rule.levels]:
            selected = self._select_for_probing(current, stride)
            if training_patches is None and not selected.any():
                break
            if training_patches is not None and training_patches.guided:
                selected = torch.zeros_like(selected)  # anchors of untrained levels probe nothing
            outputs.append(self._filter_output(current, ~selected, None if probed else len(sizes)))
            images, positions = self._patches_around(current.select(selected), sizes, stride)
            train_only = torch.zeros_like(images, dtype=torch.bool)
            if training_patches is not None:
                images, positions, train_only = training_patches.complete(images, positions, stride)
            compressor = cast(PatchCompressor, self.compress[index])
            patches = compressor.patches(features[index], images, positions)
            predictions = self.predict_patches(patches, step=len(probed) + 1)
            probed.append(ProbedLevel(predictions, images, positions, stride, train_only))
            with torch.no_grad():
                current = self._probed_candidates(probed[-1], sizes)
        everything = torch.ones_like(current.scores, dtype=torch.bool)
        outputs.append(self._filter_output(current, everything, None if probed else len(sizes)))
        return self._assemble(outputs, sizes), fixed, probed

    def _predict_fixed(self, coarsest: Tensor, sizes: Tensor) -> FixedLevels:
        """Predict on the four quarters of P5 and on P6."""
        cells = torch.round(sizes[:, :2] / _STRIDES[2])  # half to even
        maps = resize_valid(self.compress[2](coarsest), cells, 2 * CELLS)
        whole = self.P6(maps.relu())  # 30 x 30 to 15 x 15 cells
        flips = [whole]
        if self.training:
            flips += [whole.flip(-1), whole.flip(-2), whole.flip(-2, -1)]
        corners = [(y, x) for y in (0, CELLS) for x in (0, CELLS)]
        quarters = [maps[..., y : y + CELLS, x : x + CELLS] for y, x in corners]
        patches = torch.stack(quarters + flips, dim=1).flatten(3).transpose(2, 3)
        predictions = self._predict(patches, self.proj_all, 0)
        return FixedLevels(predictions[:, :4], predictions[:, 4:])

    def predict_patches(self, patches: Tensor, step: int) -> Tensor:
        """Predict on probed patches (m, K * K, C) of P4, step 1, or of P3, step 2: (m, A, 5)."""
        return self._predict(patches, self.proj_patch, step)

    def _predict(self, patches: Tensor, predictor: nn.Module, step: int) -> Tensor:
        """Patches (..., K * K, C) to predictions (..., A, 5); step 0 is P5 and P6."""
        x = self.layernorm[step](patches) + self.pos_embedding[step].weight
        predictions = predictor(x.flatten(-2)).unflatten(-1, (-1, 5))
        return torch.cat([predictions[..., :4].sigmoid(), predictions[..., 4:]], dim=-1)

    def _fixed_candidates(self, fixed: FixedLevels, sizes: Tensor) -> _Candidates:
        """Collect the anchors of the quarters, then of the whole image, image by image."""
        corners = fixed.quarters.new_tensor([[0, 0], [0.5, 0], [0, 0.5], [0.5, 0.5]])
        centers = fixed.quarters[..., :2] / 2 + corners.view(1, 4, 1, 2)
        quarters = torch.cat([centers, fixed.quarters[..., 2:4] / 2], dim=-1)
        boxes = torch.cat([quarters, fixed.whole[:, :1, :, :4]], dim=1).flatten(1, 2)
        logits = torch.cat([fixed.quarters[..., 4], fixed.whole[:, :1, :, 4]], dim=1).flatten(1)
        boxes = boxes * sizes.unsqueeze(1)
        scores = logits.sigmoid() * (boxes[..., 2:] >= _MIN_SIDE).all(dim=-1)
        images = torch.arange(len(sizes), device=sizes.device).unsqueeze(1).expand_as(scores)
        return _Candidates(boxes.flatten(0, 1), scores.flatten(), images.flatten())

    def _probed_candidates(self, level: ProbedLevel, sizes: Tensor) -> _Candidates:
        """Collect the anchors of probed patches; those outside of their image get the score 0."""
        used = ~level.train_only
        predictions, images = level.predictions[used], level.images[used]
        boxes = from_patches(predictions[..., :4], level.positions[used], level.stride)
        inside = (boxes[..., :2] < sizes[images, None, :2]).all(dim=-1)
        large = (boxes[..., 2:] >= _MIN_SIDE).all(dim=-1)
        scores = predictions[..., 4].sigmoid() * (inside & large)
        images = images.unsqueeze(1).expand_as(scores)
        return _Candidates(boxes.flatten(0, 1), scores.flatten(), images.flatten())

    def _select_for_probing(self, current: _Candidates, stride: int) -> Tensor:
        """Select uncertain anchors that are small enough for a finer level; (T,) bool."""
        small = (current.boxes[:, 2:] < stride * CELLS / 2).all(dim=1)
        return (current.scores > self.rule.low) & (current.scores < self.rule.high) & small

    def _patches_around(
        self, selected: _Candidates, sizes: Tensor, stride: int
    ) -> tuple[Tensor, Tensor]:
        """Images and positions of patches around anchors, the best first."""
        centers = selected.boxes[:, :2]
        kept = patch_nms(centers, selected.scores, selected.images, stride)
        if self.rule.max_patches:
            kept = kept[rank_in_group(selected.images[kept]) < self.rule.max_patches]
        images = selected.images[kept]
        return images, crop_positions(centers[kept], sizes[images, :2], stride)

    def _filter_output(
        self, current: _Candidates, allowed: Tensor, images_of_fixed: int | None
    ) -> _Candidates:
        """Select the allowed anchors (T,) that are good enough, or the best where there are few.

        An image of which fewer than `rule.least` of the fixed levels' anchors remain outputs its
        `rule.least` best of those instead, even if they are probed.
        """
        keep = (current.scores > self.rule.output) & allowed
        if images_of_fixed is not None:
            by_image = current.scores.view(images_of_fixed, -1)
            least = min(self.rule.least, by_image.shape[1])
            kept = keep.view_as(by_image)
            best = torch.zeros_like(kept).scatter(1, by_image.topk(least, dim=1).indices, True)
            keep = torch.where(kept.sum(dim=1, keepdim=True) < least, best, kept).flatten()
        return current.select(keep)

    def _assemble(self, outputs: list[_Candidates], sizes: Tensor) -> Anchors:
        """Sort anchors by image: level by level, or by score in images with too many."""
        boxes, scores, images = (torch.cat(x) for x in zip(*outputs, strict=True))
        level = torch.cat([torch.full_like(x.images, 5 - i) for i, x in enumerate(outputs)])
        counts = images.bincount(minlength=len(sizes))
        order = scores.argsort(descending=True, stable=True)
        by_score = torch.empty_like(images).scatter(0, order, rank_in_group(images[order]))
        too_many = (counts > self.rule.most)[images]
        place = torch.where(too_many, by_score, rank_in_group(images))
        keep = place < self.rule.most
        most = int(counts.max().clamp(max=self.rule.most))
        index = images[keep], place[keep]
        whole = sizes * sizes.new_tensor([0.5, 0.5, 1.0, 1.0])
        padded = whole.unsqueeze(1).repeat(1, most, 1).index_put(index, boxes[keep])
        empty = scores.new_zeros(len(sizes), most)
        levels = empty.long().index_put(index, level[keep])
        return Anchors(padded, empty.index_put(index, scores[keep]), levels > 0, levels)


class _MLP(nn.Module):
    """Three linear layers with GELU between them."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        sizes = [inputs, hidden, hidden, outputs]
        self.layers = nn.ModuleList(nn.Linear(sizes[i], sizes[i + 1]) for i in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs)."""
        for layer in self.layers[:-1]:
            x = F.gelu(layer(x))
        result: Tensor = self.layers[-1](x)
        return result
