"""ASAG's anchors: predicted on patches of the image, few where few are needed.

Adaptive Sparse Anchor Generation, arXiv 2308.09242, section 3.2. Letters: ``B`` images, ``n`` fixed
patches, ``m`` probed patches, ``A`` anchors per patch, ``K`` cells per side of a patch.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .patches import crop_positions, cut_patches, from_patches, thinned

__all__ = ["AnchorGenerator", "Anchors", "FixedLevels", "ProbedLevel", "ProbingRule"]

_STRIDES = (8, 16, 32)  # of P3, P4 and P5, in the order of their nets
_PROBED = ((1, 16), (0, 8))  # net and stride of the levels that are probed: P4, then P3


class ProbingRule(NamedTuple):
    """When anchors are looked at more closely, and which are given out.

    Attributes:
        low: anchors of at least this location score are worth a closer look,
        high: unless they are this good already.
        overlap: IoU of patches above which one of them is enough.
        output: smallest location score that is given out.
        least: anchors of an image, of the fixed levels, whatever their scores.
        most: anchors of an image.
        min_side: of an anchor in pixels; smaller ones have no score.
        max_patches: per image and level; 0 for no limit.
        levels: that are probed: 2, P4 and P3, to 0.
    """

    low: float = 0.1
    high: float = 0.7
    overlap: float = 0.25
    output: float = 0.1
    least: int = 5
    most: int = 200
    min_side: float = 3.0
    max_patches: int = 0
    levels: int = 2


class FixedLevels(NamedTuple):
    """What is predicted for every image.

    Attributes:
        quarters: (B, 4, A, 5) on P5: cxcywh relative to the quarter of the image, location logit.
        whole: (B, 1 or 4, A, 5) on P6, relative to the image; of flipped images in training.
    """

    quarters: Tensor
    whole: Tensor


class ProbedLevel(NamedTuple):
    """What is predicted on the probed patches of a level.

    Attributes:
        predictions: (m, A, 5) cxcywh relative to the patch, location logit.
        images: (m,) int64, the image of each patch.
        positions: (m, 2) upper left cell, x and y.
        stride: of the level.
    """

    predictions: Tensor
    images: Tensor
    positions: Tensor
    stride: int


class Anchors(NamedTuple):
    """Anchors of a batch, padded.

    Attributes:
        boxes: (B, N, 4) cxcywh in pixels; in the padding the whole image.
        scores: (B, N) location scores, 0 in the padding.
        mask: (B, N) bool, False in the padding.
    """

    boxes: Tensor
    scores: Tensor
    mask: Tensor


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
        """
        super().__init__()
        self.cells = cells
        self.rule = rule or ProbingRule()
        self.compress = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, channels // 2, 1),
                nn.GELU(),
                nn.Conv2d(channels // 2, compressed, 3, padding=1),
            )
            for _ in _STRIDES
        )
        self.P6 = nn.Conv2d(compressed, compressed, 3, stride=2, padding=2, dilation=2)
        shape = (cells * cells, compressed)
        # One for P5 and P6, one for P4, one for P3.
        self.layernorm = nn.ModuleList(nn.LayerNorm(shape) for _ in range(3))
        self.pos_embedding = nn.ModuleList(nn.Embedding(*shape) for _ in range(3))
        flat = shape[0] * shape[1]
        self.proj_all = _Perceptron(flat, hidden, 5 * fixed_anchors)
        self.proj_patch = _Perceptron(flat, hidden, 5 * probed_anchors)

    def forward(
        self, features: list[Tensor], sizes: Tensor
    ) -> tuple[Anchors, FixedLevels, list[ProbedLevel]]:
        """Generate the anchors of a batch.

        Args:
            features: P3, P4 and P5, (B, D, H_l, W_l).
            sizes: (B, 4) ``w, h, w, h`` of each image in pixels.

        Returns:
            Anchors without gradient; predictions with it, of the fixed and of the probed levels.
        """
        fixed = self._predict_fixed(features[2], sizes)
        with torch.no_grad():
            current = self._fixed_candidates(fixed, sizes)
        kept: list[_Candidates] = []
        probed: list[ProbedLevel] = []
        for step, (net, stride) in enumerate(_PROBED[: self.rule.levels]):
            chosen = self._worth_a_look(current, stride)
            if not chosen.any():
                break
            kept.append(self._given_out(current, ~chosen, least=step == 0))
            images, positions = self._patches_around(current, chosen, sizes, stride)
            level = self.compress[net](features[net])
            found = self._predict_patches(level, images, positions, step + 1)
            probed.append(ProbedLevel(found, images, positions, stride))
            with torch.no_grad():
                current = self._probed_candidates(probed[-1], sizes)
        everything = torch.ones_like(current.scores, dtype=torch.bool)
        kept.append(self._given_out(current, everything, least=not probed))
        return self._assembled(kept, sizes), fixed, probed

    def _predict_fixed(self, coarsest: Tensor, sizes: Tensor) -> FixedLevels:
        side = 2 * self.cells
        level = self.compress[2](coarsest)
        shapes = [(round(h / 32), round(w / 32)) for w, h in sizes[:, :2].tolist()]
        maps = torch.cat(
            [
                F.interpolate(
                    level[i : i + 1, :, : max(h, 1), : max(w, 1)], (side, side), mode="bilinear"
                )
                for i, (h, w) in enumerate(shapes)
            ]
        )
        whole = self.P6(maps.relu()).unsqueeze(1)
        half = self.cells
        quarters = torch.stack(
            [maps[..., y : y + half, x : x + half] for y in (0, half) for x in (0, half)], dim=1
        )
        patches = torch.cat([quarters, whole], dim=1).flatten(3).transpose(2, 3)
        found = self._predict(patches, self.proj_all, 0)
        return FixedLevels(found[:, :4], found[:, 4:])

    def _predict_patches(
        self, level: Tensor, images: Tensor, positions: Tensor, place: int
    ) -> Tensor:
        patches = cut_patches(level, images, positions, self.cells)
        return self._predict(patches, self.proj_patch, place)

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
        found = level.predictions
        boxes = from_patches(found[..., :4], level.positions, level.stride, self.cells)
        inside = (boxes[..., :2] < sizes[level.images, None, :2]).all(dim=-1)
        large = (boxes[..., 2:] >= self.rule.min_side).all(dim=-1)
        scores = found[..., 4].sigmoid() * (inside & large)
        images = level.images.unsqueeze(1).expand_as(scores)
        return _Candidates(boxes.flatten(0, 1), scores.flatten(), images.flatten())

    def _worth_a_look(self, current: _Candidates, stride: int) -> Tensor:
        """Anchors that a finer level may do better: neither bad nor good, and small for it."""
        small = (current.boxes[:, 2:] < stride * self.cells / 2).all(dim=1)
        return (current.scores > self.rule.low) & (current.scores < self.rule.high) & small

    def _patches_around(
        self, current: _Candidates, chosen: Tensor, sizes: Tensor, stride: int
    ) -> tuple[Tensor, Tensor]:
        """Image and position of patches around chosen anchors, the best first."""
        centres, scores = current.boxes[chosen, :2], current.scores[chosen]
        images = current.images[chosen]
        kept = thinned(centres, scores, images, self.cells * stride, self.rule.overlap)
        if self.rule.max_patches:
            kept = kept[_rank_in_group(images[kept]) < self.rule.max_patches]
        images = images[kept]
        return images, crop_positions(centres[kept], sizes[images, :2], stride, self.cells)

    def _given_out(self, current: _Candidates, allowed: Tensor, *, least: bool) -> _Candidates:
        """Anchors that are good enough; with `least` at least so many of an image, the best."""
        keep = (current.scores > self.rule.output) & allowed
        if least:
            for image in current.images.unique():
                own = (current.images == image).nonzero()[:, 0]
                if keep[own].sum() < self.rule.least:
                    best = current.scores[own].topk(min(self.rule.least, len(own))).indices
                    keep[own] = False
                    keep[own[best]] = True
        return _Candidates(*(x[keep] for x in current))

    def _assembled(self, steps: list[_Candidates], sizes: Tensor) -> Anchors:
        """By image: step after step, or where there are too many, the best."""
        boxes, scores, images = (torch.cat(x) for x in zip(*steps, strict=True))
        rows = []
        for image in range(len(sizes)):
            own = (images == image).nonzero()[:, 0]
            if len(own) > self.rule.most:
                own = own[scores[own].topk(self.rule.most).indices]
            rows.append(own)
        most = max(len(own) for own in rows)
        whole = sizes * sizes.new_tensor([0.5, 0.5, 1.0, 1.0])
        out = whole.unsqueeze(1).repeat(1, most, 1)
        out_scores, mask = out.new_zeros(len(rows), most), out.new_zeros(len(rows), most).bool()
        for image, own in enumerate(rows):
            out[image, : len(own)] = boxes[own]
            out_scores[image, : len(own)] = scores[own]
            mask[image, : len(own)] = True
        return Anchors(out, out_scores, mask)


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


def _rank_in_group(groups: Tensor) -> Tensor:
    """How many of the same group stand before each entry."""
    same = groups.unsqueeze(0) == groups.unsqueeze(1)
    return same.tril(-1).sum(dim=1)
