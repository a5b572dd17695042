"""Statistics of Dynamic R-CNN's proposals, and the two settings computed from them."""

import logging
from typing import Any

import torch
from detectron2.utils import comm
from torch import Tensor

from ...utils.distributed import all_gather
from ...utils.training import TrainingState

_LOGGER = logging.getLogger(__name__)
_LEAST_BETA = 1e-5  # a smaller median, of proposals that equal their ground truth, is not used


class DynamicTrainingStats(TrainingState):
    """Foreground threshold and transition point of the box loss, updated every `window` iterations.

    Dynamic R-CNN (arXiv 2004.06002), sections 4.1 and 4.2: the threshold is the mean over a window
    of an IoU statistic, the transition point (beta) the median of an error statistic, both over all
    processes. The state, with an unfinished window, is part of the checkpoint.

    Attributes:
        iou_thresh: () current foreground threshold.
        beta: () current transition point.
        iou_hist: (processes, window) statistics of this window, NaN if there are none. Each process
            fills its row; `share` gathers the rows.
        err_hist: likewise.
        step: () int64, iterations recorded.
    """

    iou_thresh: Tensor
    beta: Tensor
    iou_hist: Tensor
    err_hist: Tensor
    step: Tensor

    def __init__(
        self, *, window: int, warmup_iou: float, warmup_beta: float, max_iou: float
    ) -> None:
        """Set the limits; warm-up values are initial ones, the smallest IoU and largest beta."""
        super().__init__()
        self.window = window
        self.warmup_iou, self.warmup_beta, self.max_iou = warmup_iou, warmup_beta, max_iou
        self.register_buffer("iou_thresh", torch.tensor(warmup_iou))
        self.register_buffer("beta", torch.tensor(warmup_beta))
        self.row, processes = comm.get_rank(), comm.get_world_size()
        self.register_buffer("iou_hist", torch.full((processes, window), torch.nan))
        self.register_buffer("err_hist", torch.full((processes, window), torch.nan))
        self.register_buffer("step", torch.tensor(0))
        self._count = 0  # `step` on the host, so that no iteration waits for the device

    @torch.no_grad()
    def record(self, iou: Tensor, error: Tensor) -> None:
        """Record the statistics of an iteration, () each, NaN for none.

        At the end of a window this is a collective: every process records every iteration.
        """
        place = self._count % self.window
        self.iou_hist[self.row, place] = iou
        self.err_hist[self.row, place] = error
        self._count += 1
        self.step.fill_(self._count)
        if self._count % self.window == 0:
            self._update()

    @torch.no_grad()
    def share(self) -> None:
        """Gather the rows of all processes; called by all of them before a checkpoint."""
        local = torch.stack([self.iou_hist[self.row], self.err_hist[self.row]])
        ious, errors = all_gather(local).unbind(dim=1)
        self.iou_hist.copy_(ious)
        self.err_hist.copy_(errors)

    def _update(self) -> None:
        self.share()
        mean = self.iou_hist.nanmean()
        threshold = mean.clamp(self.warmup_iou, self.max_iou)
        self.iou_thresh.copy_(torch.where(mean.isnan(), self.iou_thresh, threshold))
        # Not `nanmedian`, which would be the lower of the two middle values.
        median = self.err_hist.flatten().nanquantile(0.5)
        keep = median.isnan() | (median < _LEAST_BETA)
        self.beta.copy_(torch.where(keep, self.beta, median.clamp(max=self.warmup_beta)))
        self.iou_hist.fill_(torch.nan)
        self.err_hist.fill_(torch.nan)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        """Keep the initial state for weights of other detectors, and for other window shapes."""
        current = {prefix + name: buffer for name, buffer in self.named_buffers()}
        if not current.keys() & state.keys():
            _LOGGER.info("The weights have no statistics of Dynamic R-CNN: they start anew.")
            state.update(current)
        # A checkpointer may have removed what does not fit.
        histories = [prefix + name for name in ("iou_hist", "err_hist")]
        if any(k not in state or state[k].shape != current[k].shape for k in histories):
            state.update({k: current[k] for k in (*histories, f"{prefix}step")})
        super()._load_from_state_dict(state, prefix, *args)
        self._count = int(self.step)

    def extra_repr(self) -> str:
        """Settings for the printed model."""
        return f"window={self.window}, iou from {self.warmup_iou}, beta from {self.warmup_beta}"
