"""DPG, dynamic proposal generation: proposals mixed from experts for every image.

Dynamic Sparse R-CNN, arXiv 2205.02101, section 3.2. Letters: ``B`` images, ``P`` proposals, ``D``
channels, ``E`` experts, ``L`` levels.
"""

import logging
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from ...layers.norm import ImageNorm
from ...structures import Proposals, at_least_float32, box_cxcywh_to_xyxy
from ...utils.events import storage_in_turn
from ..decoder.rcnn_head import stride_of
from .build import PROPOSALS_REGISTRY, ProposalSource
from .learned import initial_boxes
from .staircase import StairStep, climb, resize_nearest, summarize

__all__ = ["DynamicProposals", "LogitNorm", "TemperatureSchedule", "mixing_statistics"]


class TemperatureSchedule(NamedTuple):
    """Linear from `start` to `end` over `iterations` training steps, then `end`.

    Annealing as in dynamic convolution (arXiv 1912.03458, section 3.3), whose method Dynamic Sparse
    R-CNN takes over.

    Attributes:
        start: at step 0.
        end: from step `iterations` on, and in evaluation.
        iterations: how long; 0 for `end` from the first step on.
    """

    start: float = 30.0
    end: float = 1.0
    iterations: int = 75000

    def at(self, step: Tensor) -> Tensor:
        """Temperature of a training step, a tensor on the device of `step`."""
        done = (step / max(self.iterations, 1)).clamp(max=1.0)
        if self.iterations == 0:
            done = done * 0 + 1
        return self.start + (self.end - self.start) * done


class LogitNorm(nn.Module):
    """Mean 0 and variance 1 over images for every logit, in float32.

    The mean over experts, to which a softmax is blind, is taken off before: otherwise all logits of
    an image could go up and down together, and the experts would still weigh the same.
    """

    def __init__(self, experts: int, proposals: int) -> None:
        """Make running statistics for ``E * P`` logits."""
        super().__init__()
        self.norm = ImageNorm(experts * proposals)

    def forward(self, logits: Tensor) -> Tensor:
        """(B, E, P) to (B, E, P)."""
        logits = at_least_float32(logits)
        relative = logits - logits.mean(dim=1, keepdim=True)
        return self.norm(relative.flatten(1)).view_as(logits)


@torch.no_grad()
def mixing_statistics(weights: Tensor) -> dict[str, Tensor]:
    """Sum up the weights of a batch.

    Args:
        weights: (B, E, P), summing to 1 over the experts.

    Returns:
        Scalars: ``entropy``, mean over images and proposals, 1 for equal weights and 0 for a choice
        of one expert; ``dead``, share of the experts of all proposals that have a weight of less
        than 0.01 on every image; with several images ``variation``, mean total-variation distance
        between the weights of two of them, 0 if all get the same proposals and at most 1.
    """
    images, experts, _ = weights.shape
    plogp = weights * weights.clamp(min=torch.finfo(weights.dtype).tiny).log()
    entropy = -plogp.sum(dim=1).mean() / math.log(max(experts, 2))
    found = {"entropy": entropy, "dead": (weights.amax(dim=0) < 0.01).float().mean()}
    if images > 1:
        by_proposal = weights.permute(2, 0, 1)
        distance = torch.cdist(by_proposal, by_proposal, p=1.0) / 2
        found["variation"] = distance.sum(dim=(1, 2)).mean() / (images * (images - 1))
    return found


_LOGGER = logging.getLogger(__name__)


@PROPOSALS_REGISTRY.register()
class DynamicProposals(ProposalSource):
    """Every proposal has ``E`` experts; the image decides how they are mixed.

    A small network looks at the whole pyramid and gives each proposal a softmax over its experts.
    The same weights mix boxes and features, so a mixed box lies between those of its experts.

    Attributes:
        expert_boxes: (E, P, 4) centre and size as fractions of the image.
        expert_features: (E, P, D).
        step: training iterations so far; they set the temperature.
    """

    step: Tensor

    @configurable
    def __init__(
        self,
        *,
        num_proposals: int,
        channels: int,
        temperature: TemperatureSchedule,
        strides: Sequence[int] = (4, 8, 16, 32),
        num_experts: int = 4,
        boxes: str = "image",
        box_jitter: float = 0.0,
        staircase: bool = True,
        norm: str = "BN",
        reduce: str = "sum",
        standardize: bool = True,
        resize: int = 30,
        hidden: int = 1500,
        zero_init: bool = False,
        logit_norm: bool = True,
        valid_region: bool = False,
        tiling_noise: float = 0.0,
        log_period: int = 0,
    ) -> None:
        """Build experts and weight network.

        Args:
            num_proposals: ``P``.
            channels: ``D``, of proposals and levels.
            temperature: of the softmax.
            strides: of the ``L`` levels, finest first.
            num_experts: ``E``.
            boxes: where boxes start, see `initial_boxes`.
            box_jitter: standard deviation of what tells the boxes of experts apart at the start,
                relative to the box.
            staircase: False resizes every level by itself instead.
            norm: of the staircase, see `StairStep`.
            reduce: "sum" or "mean" over the channels of the map.
            standardize: give the map of every image mean 0 and variance 1. Without it a few steps
                of the optimizer move all logits so far that the softmax picks one expert for good.
            resize: side of the map that the linear layers see.
            hidden: width between them.
            zero_init: start the last layer at zero, so that all experts weigh the same.
            logit_norm: standardize every logit over the images of all processes. Without it what is
                common to all images grows much faster than what tells them apart, until they all
                get the same experts and the others learn no more. Two images are told apart by a
                sign alone, which no gradient changes: a batch should have four at least.
            valid_region: resize only the image, padded as it would be alone, and not the padding of
                the batch. Neighbours then reach an image's proposals only through the backbone, at
                its border, and not at all where padded sizes are equal.
            tiling_noise: standard deviation of what is added to features when a static model is
                loaded. Experts that are the same hear nothing of what the network could learn.
            log_period: iterations between entries on the mixture in the training log; 0 for none.
        """
        super().__init__()
        start = initial_boxes(boxes, num_proposals).expand(num_experts, -1, -1)
        centre, size = start.split(2, dim=-1)
        noise = box_jitter * torch.randn(2, *centre.shape)
        # Relative to the box, so that none turns inside out.
        jittered = torch.cat([centre + noise[0] * size, size * noise[1].exp()], dim=-1)
        self.expert_boxes = nn.Parameter(jittered)
        self.expert_features = nn.Parameter(torch.randn(num_experts, num_proposals, channels))
        steps = range(1, len(strides)) if staircase else ()
        self.stair = nn.ModuleList(StairStep(channels * i, norm) for i in steps)
        self.fc1 = nn.Linear(resize**2, hidden)
        self.fc2 = nn.Linear(hidden, num_experts * num_proposals)
        self.logit_norm = LogitNorm(num_experts, num_proposals) if logit_norm else nn.Identity()
        if zero_init:
            nn.init.zeros_(self.fc2.weight)
            nn.init.zeros_(self.fc2.bias)
        self.reduce = reduce
        self.standardize = standardize
        self.resize = resize
        self.valid_region = valid_region
        self.strides = list(strides)
        self.temperature = temperature
        self.tiling_noise = tiling_noise
        self.log_period = log_period
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read `MODEL.SparseRCNN`, ``.DPG`` and the levels."""
        node = cfg.MODEL.SparseRCNN
        dpg = node.DPG
        annealing = dpg.TAU_ITERS
        if annealing is None:  # as much of the schedule as 10 of 36 epochs
            annealing = round(cfg.SOLVER.MAX_ITER * 10 / 36)
        return {
            "num_proposals": node.NUM_PROPOSALS,
            "channels": node.HIDDEN_DIM,
            "strides": [stride_of(name) for name in cfg.MODEL.ROI_HEADS.IN_FEATURES],
            "num_experts": dpg.NUM_EXPERTS,
            "boxes": node.PROPOSALS.BOXES,
            "box_jitter": dpg.BOX_JITTER,
            "staircase": dpg.STAIRCASE,
            "norm": dpg.NORM,
            "reduce": dpg.REDUCE,
            "standardize": dpg.STANDARDIZE,
            "resize": dpg.RESIZE,
            "hidden": dpg.HIDDEN,
            "zero_init": dpg.ZERO_INIT,
            "logit_norm": dpg.LOGIT_NORM,
            "valid_region": dpg.VALID_REGION,
            "temperature": TemperatureSchedule(dpg.TAU_START, dpg.TAU_END, annealing),
            "tiling_noise": dpg.TILING_NOISE,
            "log_period": dpg.LOG_PERIOD,
        }

    def forward(self, features: list[Tensor], sizes: Tensor) -> Proposals:
        """Mix the experts for each image.

        Args:
            features: pyramid levels (B, D, H_l, W_l), finest first.
            sizes: (B, 4) ``w, h, w, h`` of each image in pixels.

        Returns:
            Boxes (B, P, 4) xyxy in pixels and features (B, P, D).
        """
        logits = self.logits(features, sizes)
        weights = self.choose(logits)
        if self.training and torch.is_grad_enabled():
            self._log(logits, weights)
        boxes, mixed = self.mix(weights)
        return Proposals(box_cxcywh_to_xyxy(boxes) * sizes.unsqueeze(1), mixed)

    def end_iteration(self) -> None:
        """A step of the temperature passes."""
        self.step += 1

    def mix(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Sum the experts up by weight.

        Args:
            weights: (B, E, P).

        Returns:
            Boxes (B, P, 4), centre and size as fractions of the image, and features (B, P, D).
        """
        # Boxes in half precision would be known to a pixel at best.
        with torch.autocast(weights.device.type, enabled=False):
            boxes = torch.einsum("bep,epc->bpc", weights, at_least_float32(self.expert_boxes))
            features = torch.einsum("bep,epd->bpd", weights, at_least_float32(self.expert_features))
        return boxes, features

    def weights(self, features: list[Tensor], sizes: Tensor) -> Tensor:
        """How much each expert counts, by image and proposal.

        Returns:
            (B, E, P) float32, at least 0, summing to 1 over the experts.
        """
        return self.choose(self.logits(features, sizes))

    def choose(self, logits: Tensor) -> Tensor:
        """Weights from logits, both (B, E, P)."""
        return (at_least_float32(logits) / self.current_temperature()).softmax(dim=1)

    def logits(self, features: list[Tensor], sizes: Tensor) -> Tensor:
        """What the weight network says before the softmax, (B, E, P)."""
        if len(self.stair):
            seen = self._square(climb(features, self.stair), sizes, self.strides[-1])
        else:
            # Reducing over channels and stretching can be swapped; so nothing is concatenated.
            levels = zip(features, self.strides, strict=True)
            squares = torch.stack([self._square(x, sizes, stride) for x, stride in levels])
            seen = squares.sum(dim=0) if self.reduce == "sum" else squares.mean(dim=0)
        seen = seen.flatten(1)
        if self.standardize:
            seen = F.layer_norm(seen, seen.shape[1:])
        hidden = F.relu(self.fc1(seen))
        # Not in half precision: what tells images apart is small beside what they have in common.
        with torch.autocast(hidden.device.type, enabled=False):
            logits = self.fc2(hidden.to(self.fc2.weight.dtype))
            shaped: Tensor = self.logit_norm(logits.view(-1, *self.expert_boxes.shape[:2]))
        return shaped

    def current_temperature(self) -> Tensor:
        """Of the step at hand; in evaluation that of the end."""
        if self.training:
            return self.temperature.at(self.step)
        return self.temperature.at(torch.full_like(self.step, self.temperature.iterations))

    def _log(self, logits: Tensor, weights: Tensor) -> None:
        storage = storage_in_turn(self.log_period)
        if storage is not None:
            found = {"tau": self.current_temperature(), **mixing_statistics(weights)}
            found["spread"] = logits.std(dim=1, correction=0).mean()
            values = torch.stack(list(found.values())).tolist()
            named = {f"dpg/{name}": value for name, value in zip(found, values, strict=True)}
            storage.put_scalars(smoothing_hint=False, **named)

    def _square(self, x: Tensor, sizes: Tensor, stride: int) -> Tensor:
        """A level (B, C, H, W) as the map the linear layers see, (B, resize, resize)."""
        valid = None
        if self.valid_region:
            # What the level would measure if the image came alone, padded to the coarsest level.
            coarse = self.strides[-1]
            padded = (sizes[:, :2].flip(-1) / coarse).ceil() * coarse
            valid = (padded / stride).round().long()
        return resize_nearest(summarize(x, self.reduce), self.resize, valid)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Take the proposals of a static model as those of every expert."""
        for part in ("boxes", "features"):
            static, own = f"{prefix}init_proposal_{part}.weight", f"{prefix}expert_{part}"
            mine = getattr(self, f"expert_{part}")
            if static in state_dict and state_dict[static].shape == mine.shape[1:]:
                tiled = state_dict.pop(static).expand(mine.shape).clone()
                if part == "features" and self.tiling_noise:
                    # The same on all processes, whatever their seeds are.
                    generator = torch.Generator().manual_seed(0)
                    noise = torch.randn(tiled.shape, generator=generator).to(tiled)
                    tiled = tiled + self.tiling_noise * noise
                state_dict[own] = tiled
                _LOGGER.info(
                    "The %s of a static model became those of all %d experts.", part, len(mine)
                )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
