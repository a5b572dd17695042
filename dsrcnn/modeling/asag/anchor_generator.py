"""ASAG's anchors: predicted on patches of the image, few where few are needed.

Adaptive Sparse Anchor Generation, arXiv 2308.09242, section 3.2. Letters: ``B`` images, ``n`` fixed
patches, ``m`` probed patches, ``A`` anchors per patch, ``K`` cells per side of a patch.
"""

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from torch import Tensor, nn

from ...layers.blocks import initialize_xavier
from ...utils.events import storage_in_turn
from .patches import (
    Anchors,
    FixedLevels,
    PatchCompressor,
    PatchLessons,
    ProbedLevel,
    ProbingRule,
    crop_positions,
    from_patches,
    rank_in_group,
    resize_valid,
    thinned,
)

__all__ = [
    "AnchorGenerator",
    "AnchorLog",
]


_STRIDES = (8, 16, 32)  # of P3, P4 and P5, in the order of their nets
_PROBED = ((1, 16), (0, 8))  # net and stride of the levels that are probed: P4, then P3


class _Candidates(NamedTuple):
    """Anchors of one step, of all images in one list: (R, 4) cxcywh in pixels, (R,), (R,)."""

    boxes: Tensor
    scores: Tensor
    images: Tensor


class AnchorGenerator(nn.Module):
    """Fixed levels P6 and P5, and Adaptive Probing of P4 and P3.

    Parameter names follow the published checkpoints.
    """

    def __init__(
        self,
        *,
        channels: int = 256,
        compressed: int = 8,
        cells: int = 15,
        hidden: int = 1000,
        fixed_anchors: int = 50,
        probed_anchors: int = 20,
        rule: ProbingRule | None = None,
        norms_at_random: bool = False,
    ) -> None:
        """Make the nets.

        Args:
            channels: of the pyramid.
            compressed: channels that patches are cut from.
            cells: ``K``.
            hidden: width of the predictors.
            fixed_anchors: per patch of P5 and P6.
            probed_anchors: per patch of P4 and P3.
            rule: which anchors are given out or looked at more closely.
            norms_at_random: start the factors and shifts of the patches' norms like weights, as the
                published code does by mistake.
        """
        super().__init__()
        self.cells = cells
        self.rule = rule or ProbingRule()
        self.compress = nn.ModuleList(PatchCompressor(channels, compressed) for _ in _STRIDES)
        self.P6 = nn.Conv2d(compressed, compressed, 3, stride=2, padding=2, dilation=2)
        shape = (cells * cells, compressed)
        # One for P5 and P6, one for P4, one for P3.
        self.layernorm = nn.ModuleList(nn.LayerNorm(shape) for _ in range(3))
        self.pos_embedding = nn.ModuleList(nn.Embedding(*shape) for _ in range(3))
        flat = shape[0] * shape[1]
        self.proj_all = _Perceptron(flat, hidden, 5 * fixed_anchors)
        self.proj_patch = _Perceptron(flat, hidden, 5 * probed_anchors)
        self.initialize(norms_at_random=norms_at_random)

    @property
    def probes_every_level(self) -> bool:
        """Whether all nets are used."""
        return self.rule.levels == len(_PROBED)

    @torch.no_grad()
    def initialize(self, *, norms_at_random: bool = False) -> None:
        """Xavier, positions included."""
        initialize_xavier(self)
        if not norms_at_random:
            for norm in self.layernorm:
                cast(nn.LayerNorm, norm).reset_parameters()

    def forward(
        self, features: list[Tensor], sizes: Tensor, lessons: PatchLessons | None = None
    ) -> tuple[Anchors, FixedLevels, list[ProbedLevel]]:
        """Generate the anchors of a batch.

        Args:
            features: P3, P4 and P5, (B, D, H_l, W_l).
            sizes: (B, 4) ``w, h, w, h`` of each image in pixels.
            lessons: in training, patches to learn from.

        Returns:
            Anchors without gradient; predictions with it, of the fixed and of the probed levels.
        """
        fixed = self._predict_fixed(features[2], sizes)
        with torch.no_grad():
            current = self._fixed_candidates(fixed, sizes)
        kept: list[_Candidates] = []
        probed: list[ProbedLevel] = []
        for net, stride in _PROBED[: self.rule.levels]:
            chosen = self._worth_a_look(current, stride, len(sizes), lessons)
            if lessons is None and not chosen.any():
                break
            kept.append(self._given_out(current, ~chosen, 0 if probed else len(sizes)))
            spots = self._patches_around(current, chosen, sizes, stride)
            probed.append(self._probe(features[net], net, *spots, stride, lessons))
            with torch.no_grad():
                current = self._probed_candidates(probed[-1], sizes)
        everything = torch.ones_like(current.scores, dtype=torch.bool)
        kept.append(self._given_out(current, everything, 0 if probed else len(sizes)))
        return self._assembled(kept, sizes), fixed, probed

    def _predict_fixed(self, coarsest: Tensor, sizes: Tensor) -> FixedLevels:
        cells = torch.round(sizes[:, :2] / _STRIDES[2])  # half to even
        maps = resize_valid(self.compress[2](coarsest), cells, 2 * self.cells)
        whole = self.P6(maps.relu())
        flips = [whole]
        if self.training:
            flips += [whole.flip(-1), whole.flip(-2), whole.flip(-2, -1)]
        half = self.cells
        quarters = [maps[..., y : y + half, x : x + half] for y in (0, half) for x in (0, half)]
        patches = torch.stack(quarters + flips, dim=1).flatten(3).transpose(2, 3)
        found = self._predict(patches, self.proj_all, 0)
        return FixedLevels(found[:, :4], found[:, 4:])

    def _probe(
        self,
        level: Tensor,
        net: int,
        images: Tensor,
        positions: Tensor,
        stride: int,
        lessons: PatchLessons | None,
    ) -> ProbedLevel:
        """Look at patches, and in training at more of them."""
        spare = torch.zeros_like(images, dtype=torch.bool)
        if lessons is not None:
            images, positions, spare = lessons.complete(images, positions, stride, self.cells)
        compressor = self.compress[net]
        assert isinstance(compressor, PatchCompressor)
        patches = compressor.patches(level, images, positions, self.cells)
        found = self.predict_patches(patches, len(_PROBED) - net)
        return ProbedLevel(found, images, positions, stride, spare)

    def predict_patches(self, patches: Tensor, step: int) -> Tensor:
        """Anchors (m, A, 5) of probed patches (m, K * K, C): of P4, step 1, or of P3, step 2."""
        return self._predict(patches, self.proj_patch, step)

    def _predict(self, patches: Tensor, predictor: nn.Module, place: int) -> Tensor:
        """Patches (..., K * K, C) to anchors (..., A, 5)."""
        x = self.layernorm[place](patches) + self.pos_embedding[place].weight
        found = predictor(x.flatten(-2)).unflatten(-1, (-1, 5))
        return torch.cat([found[..., :4].sigmoid(), found[..., 4:]], dim=-1)

    def _fixed_candidates(self, fixed: FixedLevels, sizes: Tensor) -> _Candidates:
        """Of the quarters, then of the whole image, image after image."""
        corner = fixed.quarters.new_tensor([[0, 0], [0.5, 0], [0, 0.5], [0.5, 0.5]])
        centres = fixed.quarters[..., :2] / 2 + corner.view(1, 4, 1, 2)
        quarters = torch.cat([centres, fixed.quarters[..., 2:4] / 2], dim=-1)
        boxes = torch.cat([quarters, fixed.whole[:, :1, :, :4]], dim=1).flatten(1, 2)
        logits = torch.cat([fixed.quarters[..., 4], fixed.whole[:, :1, :, 4]], dim=1).flatten(1)
        boxes = boxes * sizes.unsqueeze(1)
        scores = logits.sigmoid() * (boxes[..., 2:] >= self.rule.min_side).all(dim=-1)
        images = torch.arange(len(sizes), device=sizes.device).unsqueeze(1).expand_as(scores)
        return _Candidates(boxes.flatten(0, 1), scores.flatten(), images.flatten())

    def _probed_candidates(self, level: ProbedLevel, sizes: Tensor) -> _Candidates:
        used = ~level.spare
        found, images, positions = (
            x[used] for x in (level.predictions, level.images, level.positions)
        )
        boxes = from_patches(found[..., :4], positions, level.stride, self.cells)
        inside = (boxes[..., :2] < sizes[images, None, :2]).all(dim=-1)
        large = (boxes[..., 2:] >= self.rule.min_side).all(dim=-1)
        scores = found[..., 4].sigmoid() * (inside & large)
        images = images.unsqueeze(1).expand_as(scores)
        return _Candidates(boxes.flatten(0, 1), scores.flatten(), images.flatten())

    def _worth_a_look(
        self, current: _Candidates, stride: int, images: int, lessons: PatchLessons | None
    ) -> Tensor:
        """Anchors that a finer level may do better: neither bad nor good, and small for it."""
        small = (current.boxes[:, 2:] < stride * self.cells / 2).all(dim=1)
        chosen = (current.scores > self.rule.low) & (current.scores < self.rule.high) & small
        if lessons is not None:
            return chosen & (not lessons.guided)
        counts = torch.bincount(current.images[chosen], minlength=images)
        return chosen & (counts >= self.rule.min_chosen)[current.images]

    def _patches_around(
        self, current: _Candidates, chosen: Tensor, sizes: Tensor, stride: int
    ) -> tuple[Tensor, Tensor]:
        """Image and position of patches around chosen anchors, the best first."""
        centres, scores = current.boxes[chosen, :2], current.scores[chosen]
        images = current.images[chosen]
        kept = thinned(centres, scores, images, self.cells * stride, self.rule.overlap)
        if self.rule.max_patches:
            kept = kept[rank_in_group(images[kept]) < self.rule.max_patches]
        images = images[kept]
        return images, crop_positions(centres[kept], sizes[images, :2], stride, self.cells)

    def _given_out(self, current: _Candidates, allowed: Tensor, images: int) -> _Candidates:
        """Anchors that are good enough; of the fixed levels of `images` some of each at least."""
        keep = (current.scores > self.rule.output) & allowed
        if images:
            by_image = current.scores.view(images, -1)
            least = min(self.rule.least, by_image.shape[1])
            own = keep.view_as(by_image)
            best = torch.zeros_like(own).scatter(1, by_image.topk(least, dim=1).indices, True)
            keep = torch.where(own.sum(dim=1, keepdim=True) < least, best, own).flatten()
        return _Candidates(*(x[keep] for x in current))

    def _assembled(self, steps: list[_Candidates], sizes: Tensor) -> Anchors:
        """By image: step after step, or where there are too many, the best."""
        boxes, scores, images = (torch.cat(x) for x in zip(*steps, strict=True))
        level = torch.cat([torch.full_like(x.images, 5 - i) for i, x in enumerate(steps)])
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


class _Perceptron(nn.Module):
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


class AnchorLog:
    """Writes into Detectron2's event storage, every `period` iterations.

    Means over the images of the process: ``asag/anchors``, ``asag/location_score`` of the best
    anchor, and for level 4 and 3 ``asag/patches_p4`` that gave anchors out.
    """

    def __init__(self, period: int) -> None:
        """Set the period in iterations."""
        self.period = period

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "AnchorLog | None":
        """Read `MODEL.ASAG`; None where nothing is to be logged."""
        period = cfg.MODEL.ASAG.LOG_PERIOD
        return cls(period) if period else None

    def __call__(self, anchors: Anchors, probed: list[ProbedLevel]) -> None:
        """Log this iteration if it is its turn."""
        storage = storage_in_turn(self.period)
        if storage is None:
            return
        images = len(anchors.mask)
        found = {
            "anchors": anchors.mask.sum() / images,
            "location_score": anchors.scores.amax(dim=1).mean(),
        }
        for level in probed:
            name = f"patches_p{level.stride.bit_length() - 1}"
            found[name] = (~level.spare).sum() / images
        values = torch.stack(list(found.values())).tolist()  # one transfer
        named = {f"asag/{k}": v for k, v in zip(found, values, strict=True)}
        storage.put_scalars(smoothing_hint=False, **named)
