"""All losses of ASAG (section 3.5): of anchors, of the query initializer, of the decoders.

Letters: ``B`` images, ``N`` anchors, ``K`` decoders, ``S`` prediction sets, ``C`` classes, ``M``
objects (padded).
"""

from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from ...structures import (
    Predictions,
    Targets,
    TermWeights,
    box_xyxy_to_cxcywh,
    mean_over_processes,
)
from .anchors import FixedLevels, Objects, ProbedLevel
from .set_losses import Learned, SetLosses, anchor_losses, detection_losses, match
from .training_patches import objects_in_patches, objects_in_quarters, objects_of_flips
from .weighting import area_weight

__all__ = ["ASAGCounts", "ASAGCriterion", "objects_of"]

_FIXED_PATCHES = 4  # of P5, and of P6 with its flips: what the probed ones together count as


class ASAGCounts(NamedTuple):
    """What losses are divided by.

    Attributes:
        objects: (), mean over processes, at least 1.
        images: () of this process.
    """

    objects: Tensor
    images: Tensor


def objects_of(targets: Targets) -> Objects:
    """Ground truth with boxes cxcywh as shares of the image."""
    boxes = box_xyxy_to_cxcywh(targets.boxes) / targets.sizes.unsqueeze(1)
    return Objects(boxes, targets.labels, targets.mask)


class ASAGCriterion(nn.Module):
    """Every set of predictions is matched by itself, one prediction for an object."""

    @configurable
    def __init__(
        self,
        *,
        cells: int = 15,
        weights: TermWeights,
        anchor_weights: TermWeights,
        small_object_weight: float = 4.0,
        query_weighting: bool = True,
        flip_as_corners: bool = False,
    ) -> None:
        """Set the losses.

        Args:
            cells: per side of a patch.
            weights: factors of the losses of initializer and decoders, and of all matching costs.
            anchor_weights: factors of the losses of anchors.
            small_object_weight: see `area_weight`; 1 weighs all objects the same.
            query_weighting: see `query_weights`.
            flip_as_corners: see `objects_of_flips`.
        """
        super().__init__()
        self.cells = cells
        self.weights = weights
        self.anchor_weights = anchor_weights
        self.small_object_weight = small_object_weight
        self.query_weighting = query_weighting
        self.flip_as_corners = flip_as_corners

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read `MODEL.ASAG`, and the weights of `MODEL.SparseRCNN`."""
        node, own = cfg.MODEL.SparseRCNN, cfg.MODEL.ASAG
        anchors = own.ANCHORS
        return {
            "cells": anchors.CELLS,
            "weights": TermWeights(node.CLASS_WEIGHT, node.L1_WEIGHT, node.GIOU_WEIGHT),
            "anchor_weights": TermWeights(
                anchors.CLASS_WEIGHT, anchors.L1_WEIGHT, anchors.GIOU_WEIGHT
            ),
            "small_object_weight": own.SMALL_OBJECT_WEIGHT,
            "query_weighting": own.QUERY_WEIGHTING,
            "flip_as_corners": own.OFFICIAL_QUIRKS,
        }

    def count(self, targets: Targets) -> ASAGCounts:
        """What a part of a batch adds to the divisors."""
        objects = targets.mask.sum().to(targets.sizes.dtype)
        return ASAGCounts(objects, torch.full_like(objects, len(targets.mask)))

    def normalizers(self, parts: list[ASAGCounts]) -> ASAGCounts:
        """Divisors for a batch that was counted in parts."""
        objects, images = (torch.stack(x).sum() for x in zip(*parts, strict=True))
        return ASAGCounts(mean_over_processes(objects).clamp(min=1), images)

    def of_anchors(
        self, fixed: FixedLevels, probed: list[ProbedLevel], targets: Targets, counts: ASAGCounts
    ) -> dict[str, Tensor]:
        """Losses of anchors on their patches.

        Args:
            fixed: predictions of P5 and P6.
            probed: of P4 and P3.
            targets: ground truth.
            counts: see `normalizers`.

        Returns:
            ``loss_ce_anchor``, ``loss_bbox_anchor``, ``loss_giou_anchor``, weighted.
        """
        objects = objects_of(targets)
        flips = objects_of_flips(objects, as_corners=self.flip_as_corners)
        if fixed.whole.shape[1] == 1:  # without flips, as in evaluation
            flips = Objects(*(x[::_FIXED_PATCHES] for x in flips))
        sums = [
            self._anchor_sums(fixed.whole.flatten(0, 1), flips, inverse=True),
            self._anchor_sums(fixed.quarters.flatten(0, 1), objects_in_quarters(objects)),
        ]
        if probed:
            wanted = [
                objects_in_patches(
                    objects, targets.sizes, x.images, x.positions, x.stride, self.cells
                )
                for x in probed
            ]
            together = Objects(*(torch.cat(x) for x in zip(*wanted, strict=True)))
            found = torch.cat([x.predictions for x in probed])
            sums.append(self._anchor_sums(found, together) * (_FIXED_PATCHES / max(len(found), 1)))
        total = torch.stack(sums).sum(dim=0) / counts.objects
        return _named(total, self.anchor_weights, "loss", "_anchor")

    def _anchor_sums(self, found: Tensor, objects: Objects, *, inverse: bool = False) -> Tensor:
        """Class, L1 and overlap loss of patches (R, A, 5), summed: (3,)."""
        weight = self._object_weight(objects, inverse=inverse)
        weighting = self.query_weighting
        losses = anchor_losses(
            found[..., 4], found[..., :4], objects, weight, self.weights, weighting=weighting
        )
        return torch.stack([x.sum() for x in losses])

    def _object_weight(self, objects: Objects, *, inverse: bool = False) -> Tensor:
        return area_weight(objects.boxes[..., 2:], self.small_object_weight, inverse=inverse)

    def of_detections(
        self, predictions: Predictions, mask: Tensor, targets: Targets, counts: ASAGCounts
    ) -> dict[str, Tensor]:
        """Losses of the query initializer, which is the first prediction set, and the decoders.

        Args:
            predictions: (1 + K, B, N, ...).
            mask: (B, N) bool, False for padding.
            targets: ground truth.
            counts: see `normalizers`.

        Returns:
            ``loss_ce_rpn`` and so on of the initializer, ``loss_ce`` of the last decoder and
            ``loss_ce_k`` of decoder k before it, weighted.
        """
        sets = len(predictions.logits)
        objects = _repeated(objects_of(targets), sets)
        logits, boxes = self._flat(predictions, targets)
        weight, valid = self._object_weight(objects), mask.repeat(sets, 1)
        learned = match(logits, boxes, objects, weight, self.weights, valid)
        sums = self._detection_sums(logits, boxes, learned, valid, sets) / counts.objects
        names = ["_rpn", *(f"_{k}" for k in range(sets - 2)), ""]
        losses = {}
        for values, suffix in zip(sums, names, strict=True):
            losses.update(_named(values, self.weights, "loss", suffix))
        return losses

    def of_denoising(
        self, predictions: Predictions, assignment: Tensor, targets: Targets, counts: ASAGCounts
    ) -> dict[str, Tensor]:
        """Losses of denoising queries, which are not matched: each has its object.

        Args:
            predictions: (1 + K, B, n, ...), of the initializer first.
            assignment: (B, n) int64, -1 for padding.
            targets: ground truth.
            counts: see `normalizers`.

        Returns:
            ``dn_loss_ce_i`` and so on, weighted; 0 is the initializer.
        """
        sets = len(predictions.logits)
        objects = _repeated(objects_of(targets), sets)
        logits, boxes = self._flat(predictions, targets)
        assigned = assignment.repeat(sets, 1)
        learned = Learned.from_assignment(assigned, objects, self._object_weight(objects))
        sums = self._detection_sums(logits, boxes, learned, assigned >= 0, sets)
        losses = {}
        for index, values in enumerate(sums / (assignment.shape[1] * counts.images)):
            losses.update(_named(values, self.weights, "dn_loss", f"_{index}"))
        return losses

    def _flat(self, predictions: Predictions, targets: Targets) -> tuple[Tensor, Tensor]:
        """Logits (S * B, N, C), and boxes (S * B, N, 4) cxcywh as shares of the image."""
        boxes = box_xyxy_to_cxcywh(predictions.boxes) / targets.sizes.unsqueeze(1)
        return predictions.logits.flatten(0, 1), boxes.flatten(0, 1)

    def _detection_sums(
        self, logits: Tensor, boxes: Tensor, learned: Learned, valid: Tensor, sets: int
    ) -> Tensor:
        """(S, 3): class, L1 and overlap loss of each prediction set, summed over the images."""
        losses: SetLosses = detection_losses(
            logits, boxes, learned, valid, weighting=self.query_weighting
        )
        return torch.stack([x.view(sets, -1).sum(dim=1) for x in losses], dim=1)


def _repeated(objects: Objects, sets: int) -> Objects:
    """The same objects for every prediction set: (S * B, M)."""
    return Objects(*(x.repeat(sets, *(1,) * (x.dim() - 1)) for x in objects))


def _named(sums: Tensor, weights: TermWeights, start: str, suffix: str) -> dict[str, Tensor]:
    names = ("ce", "bbox", "giou")
    pairs = zip(names, weights, sums.unbind(), strict=True)
    return {f"{start}_{name}{suffix}": weight * value for name, weight, value in pairs}
