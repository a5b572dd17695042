"""DPG, dynamic proposal generation: proposals mixed from experts for every image.

Dynamic Sparse R-CNN, arXiv 2205.02101, section 3.2.

Notation: ``E`` experts.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from ...layers.norm import RunningNorm
from ...structures import Proposals, at_least_float32, box_cxcywh_to_xyxy
from ...utils.events import ScalarLog
from ..decoder.rcnn_head import stride_of
from .build import PROPOSALS_REGISTRY, ProposalSource, resize_proposals
from .learned import initial_boxes
from .staircase import StairStep, fuse_levels, resize_nearest

_LOGGER = logging.getLogger(__name__)


class TemperatureSchedule(NamedTuple):
    """Linear from `start` to `end` over `iterations` training steps, then `end`.

    High at first, so that all experts learn; annealing as in dynamic convolution (arXiv 1912.03458,
    section 3.3), whose method Dynamic Sparse R-CNN adopts.

    Attributes:
        start: temperature at step 0.
        end: temperature from step `iterations` on, and in evaluation.
        iterations: length of the annealing; 0 for `end` from the first step on.
    """

    start: float
    end: float
    iterations: int

    def at(self, step: Tensor) -> Tensor:
        """Temperature of a training step, a tensor on the device of `step`."""
        progress = (step / max(self.iterations, 1)).clamp(max=1.0)
        if self.iterations == 0:
            progress = progress * 0 + 1
        return self.start + (self.end - self.start) * progress


class ScaledLinear(nn.Linear):
    """Linear layer with an equalized learning rate (Karras et al., arXiv 1710.10196, section 4.1).

    AdamW moves every weight equally far in a step. In a layer of a thousand inputs they add up to a
    large change for the images of the step and for no others. Dividing by the root of the number
    of inputs makes the change small unless many steps agree.
    """

    def __init__(self, inputs: int, outputs: int, *, zero: bool = False) -> None:
        """Initialize like ``nn.Linear``, with a bias of 0; with `zero`, weights are 0, too."""
        super().__init__(inputs, outputs)
        self.scale = inputs**-0.5
        with torch.no_grad():
            self.bias.zero_()
            self.weight.mul_(0.0 if zero else 1 / self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs) to (B, outputs)."""
        return F.linear(x * self.scale, self.weight, self.bias)


@torch.no_grad()
def mixture_statistics(weights: Tensor, boxes: Tensor) -> dict[str, Tensor]:
    """Measure whether a mixture of experts selects, and whether it depends on the image.

    Args:
        weights: (B, E, P), summing to 1 over the experts.
        boxes: (B, P, 4) mixed boxes, as fractions of the image.

    Returns:
        Scalars: ``entropy``, mean over images and proposals, 1 for equal weights and 0 for one
        expert alone; ``dead``, fraction of the experts of all proposals with a weight below 0.01 on
        every image; with several images ``variation``, mean total-variation distance between the
        weights of two images, from 0 (all get the same proposals) to 1, and ``box_variation``, mean
        standard deviation of the boxes over images.
    """
    images, experts, _ = weights.shape
    plogp = weights * weights.clamp(min=torch.finfo(weights.dtype).tiny).log()
    entropy = -plogp.sum(dim=1).mean() / math.log(max(experts, 2))
    statistics = {"entropy": entropy, "dead": (weights.amax(dim=0) < 0.01).float().mean()}
    if images > 1:
        by_proposal = weights.permute(2, 0, 1)
        distance = torch.cdist(by_proposal, by_proposal, p=1.0) / 2
        statistics["variation"] = distance.sum(dim=(1, 2)).mean() / (images * (images - 1))
        statistics["box_variation"] = boxes.std(dim=0).mean()
    return statistics


@PROPOSALS_REGISTRY.register()
class DynamicProposals(ProposalSource):
    """Mix ``E`` experts per proposal by weights that depend on the image.

    A small network maps the whole pyramid to a softmax over the experts of each proposal. The same
    weights mix boxes and features, so a mixed box lies between those of its experts.

    Attributes:
        expert_boxes: (E, P, 4) center and size as fractions of the image.
        expert_features: (E, P, D).
        step: training iterations so far, which set the temperature.
    """

    proposal_dimensions: ClassVar[Mapping[str, int]] = {"expert_boxes": 1, "expert_features": 1}
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
        box_jitter: float = 0.2,
        staircase: bool = True,
        norm: str = "BN",
        resize: int = 30,
        hidden: int = 1500,
        tiling_noise: float = 0.0,
        log: ScalarLog | None = None,
    ) -> None:
        """Build experts and weight network.

        Args:
            num_proposals: ``P``.
            channels: ``D``, of proposals and levels.
            temperature: of the softmax.
            strides: of the ``L`` levels, finest first.
            num_experts: ``E``.
            boxes: see `initial_boxes`.
            box_jitter: standard deviation of the noise on the initial boxes of the experts,
                relative to the box. With equal boxes, weights could never move a box.
            staircase: False resizes every level separately instead.
            norm: of the staircase, see `StairStep`.
            resize: side of the map that the linear layers see.
            hidden: width between them.
            tiling_noise: standard deviation of the noise on features when a static model is loaded.
                Identical experts receive identical gradients, so the mixing weights would never
                matter.
            log: for statistics of the mixture (``dpg/*``).
        """
        super().__init__()
        start = initial_boxes(boxes, num_proposals).expand(num_experts, -1, -1)
        center, size = start.split(2, dim=-1)
        noise = box_jitter * torch.randn(2, *center.shape)
        # Relative to the box, so that sizes stay positive.
        jittered = torch.cat([center + noise[0] * size, size * noise[1].exp()], dim=-1)
        self.expert_boxes = nn.Parameter(jittered)
        # Their mean has the distribution of Sparse R-CNN's features.
        features = torch.randn(num_experts, num_proposals, channels)
        self.expert_features = nn.Parameter(features * num_experts**0.5)
        steps = range(1, len(strides)) if staircase else ()
        self.stair = nn.ModuleList(StairStep(channels * i, norm) for i in steps)
        # Both layers see how an image differs from others. What all have in common is much larger,
        # and a step of the optimizer, with the same sign on every image, would move it most.
        self.map_norm = RunningNorm(resize**2)
        self.fc1 = ScaledLinear(resize**2, hidden)
        self.hidden_norm = RunningNorm(hidden)
        # Zeros: mixtures differ only as far as training finds a use for it.
        self.fc2 = ScaledLinear(hidden, num_experts * num_proposals, zero=True)
        self.resize, self.strides, self.temperature = resize, list(strides), temperature
        self.tiling_noise = tiling_noise
        self.log = log or ScalarLog(0)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read `MODEL.SparseRCNN`, ``.DPG`` and the levels."""
        node, dpg = cfg.MODEL.SparseRCNN, cfg.MODEL.SparseRCNN.DPG
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
            "resize": dpg.RESIZE,
            "hidden": dpg.HIDDEN,
            "temperature": TemperatureSchedule(dpg.TAU_START, dpg.TAU_END, annealing),
            "tiling_noise": dpg.TILING_NOISE,
            "log": ScalarLog(cfg.LOG.PERIOD),
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
        weights = self.mixing_weights(logits)
        boxes, mixed = self.mix(weights)
        if self.training and self.log.is_due():
            gain = self.fc2.weight.detach().norm(dim=1).mean() * self.fc2.scale
            scalars = {"tau": self.current_temperature(), "gain": gain}
            scalars["spread"] = logits.detach().std(dim=1, correction=0).mean()
            self.log.write("dpg", scalars | mixture_statistics(weights, boxes))
        return Proposals(box_cxcywh_to_xyxy(boxes) * sizes.unsqueeze(1), mixed)

    def end_iteration(self) -> None:
        """Advance the temperature by one step."""
        self.step += 1

    def logits(self, features: list[Tensor], sizes: Tensor) -> Tensor:
        """Compute the logits of the experts (B, E, P); arguments as for `forward`.

        The pyramid gets no gradient from here: summed over a thousand channels, it would outweigh
        that of detection.
        """
        features = [x.detach() for x in features]
        if len(self.stair):
            square = self._to_square(fuse_levels(features, self.stair), sizes, self.strides[-1])
        else:
            # Summing channels and resizing commute, so nothing is concatenated.
            levels = zip(features, self.strides, strict=True)
            squares = torch.stack([self._to_square(x, sizes, stride) for x, stride in levels])
            square = squares.sum(dim=0)
        # Not in half precision: images differ by little compared with what they have in common.
        with torch.autocast(square.device.type, enabled=False):
            hidden = F.relu(self.fc1(self.map_norm(square.flatten(1)).to(self.fc1.weight)))
            logits: Tensor = self.fc2(self.hidden_norm(hidden)).view(
                -1, *self.expert_boxes.shape[:2]
            )
        return at_least_float32(logits)

    def mixing_weights(self, logits: Tensor) -> Tensor:
        """Apply the softmax over the experts to logits (B, E, P), in float32."""
        return (at_least_float32(logits) / self.current_temperature()).softmax(dim=1)

    def mix(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Average the experts by weights (B, E, P).

        Returns boxes (B, P, 4), center and size as fractions of the image, and features (B, P, D).
        """
        # In half precision a box would be accurate to a pixel at best.
        with torch.autocast(weights.device.type, enabled=False):
            boxes = torch.einsum("bep,epc->bpc", weights, at_least_float32(self.expert_boxes))
            features = torch.einsum("bep,epd->bpd", weights, at_least_float32(self.expert_features))
        return boxes, features

    def current_temperature(self) -> Tensor:
        """Temperature of the current step; in evaluation that of the end."""
        if self.training:
            return self.temperature.at(self.step)
        return self.temperature.at(torch.full_like(self.step, self.temperature.iterations))

    def _to_square(self, x: Tensor, sizes: Tensor, stride: int) -> Tensor:
        """Sum a level (B, C, H, W) over channels and resize it to (B, resize, resize)."""
        # Without the padding of the batch, as if the image came alone, padded to the coarsest
        # stride: others then affect its proposals only through the backbone at its border.
        coarse = self.strides[-1]
        padded = (sizes[:, :2].flip(-1) / coarse).ceil() * coarse
        valid = (padded / stride).round().long()
        # Levels that are no part of what batches are padded to, such as p6, may be smaller.
        valid = torch.minimum(valid, valid.new_tensor(x.shape[-2:]))
        # In float32: the sum of a thousand channels exceeds the range of half precision.
        return resize_nearest(at_least_float32(x).sum(dim=1), self.resize, valid)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Copy the proposals of a static model to every expert."""
        boxes, features = (f"{prefix}init_proposal_{x}.weight" for x in ("boxes", "features"))
        if features in state_dict and boxes not in state_dict:
            # Content queries of AdaMixer, which are standardized in use and have the whole image.
            queries = state_dict[features]
            state_dict[features] = F.layer_norm(queries, queries.shape[-1:])
            state_dict[boxes] = initial_boxes("image", len(queries)).to(queries)
        experts = {"boxes": self.expert_boxes, "features": self.expert_features}
        for part, parameter in experts.items():
            static, name = f"{prefix}init_proposal_{part}.weight", f"{prefix}expert_{part}"
            if static in state_dict and state_dict[static].shape[1:] == parameter.shape[2:]:
                proposals = state_dict.pop(static)
                if len(proposals) != parameter.shape[1]:
                    change = (part, len(proposals), parameter.shape[1])
                    _LOGGER.warning("The %s of %d proposals were cut or tiled to %d.", *change)
                    proposals = resize_proposals(proposals, parameter.shape[1], 0)
                tiled = proposals.expand(parameter.shape).clone()
                if part == "features" and self.tiling_noise:
                    # The same on all processes, whatever their seeds.
                    generator = torch.Generator().manual_seed(0)
                    noise = torch.randn(tiled.shape, generator=generator).to(tiled)
                    tiled = tiled + self.tiling_noise * noise
                state_dict[name] = tiled
                _LOGGER.info(
                    "The %s of a static model were copied to all %d experts.", part, len(parameter)
                )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
