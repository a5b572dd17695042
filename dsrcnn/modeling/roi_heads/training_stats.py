"""What Dynamic R-CNN knows about its proposals, and the two numbers it draws from it."""

import logging
from typing import Any

import torch
from detectron2.utils import comm
from torch import Tensor, nn

from ...utils.distributed import gathered_over_processes

__all__ = ["DynamicTrainingStats"]

_LOGGER = logging.getLogger(__name__)


class DynamicTrainingStats(nn.Module):
    """Foreground threshold and transition point of the box loss, renewed every `window` iterations.

    Dynamic R-CNN (arXiv 2004.06002), sections 4.1 and 4.2: the threshold is the mean over a window
    of an IoU statistic, the transition point (beta) the median of an error statistic. All of it is
    part of the checkpoint, an unfinished window too.

    Attributes:
        iou_thresh: () foreground threshold in use.
        beta: () transition point in use.
        iou_hist: (processes, window) statistics of this window, NaN where there is none. Each
            process fills a row of its own; `share` brings all of them together.
        err_hist: likewise.
        step: () int64, iterations recorded.
    """

    averaged = False  # state of the training: an average of weights takes it as it is

    iou_thresh: Tensor
    beta: Tensor
    iou_hist: Tensor
    err_hist: Tensor
    step: Tensor

    def __init__(
        self,
        *,
        window: int = 100,
        warmup_iou: float = 0.4,
        warmup_beta: float = 1.0,
        max_iou: float = 1.0,
        eps: float = 1e-5,
        sync: bool = True,
    ) -> None:
        """Set limits.

        Args:
            window: iterations between updates.
            warmup_iou: threshold at the start and the least one.
            warmup_beta: transition point at the start and the largest one.
            max_iou: the largest threshold.
            eps: a median below it leaves beta as it is.
            sync: join the windows of all processes.
        """
        super().__init__()
        self.window = window
        self.warmup_iou, self.warmup_beta = warmup_iou, warmup_beta
        self.max_iou, self.eps, self.sync = max_iou, eps, sync
        self.register_buffer("iou_thresh", torch.tensor(warmup_iou))
        self.register_buffer("beta", torch.tensor(warmup_beta))
        self.row, processes = comm.get_rank(), comm.get_world_size()
        self.register_buffer("iou_hist", torch.full((processes, window), torch.nan))
        self.register_buffer("err_hist", torch.full((processes, window), torch.nan))
        self.register_buffer("step", torch.tensor(0))
        self._count = 0  # `step` on the host, so that no iteration waits for the device

    @torch.no_grad()
    def record(self, iou: Tensor, error: Tensor) -> None:
        """Take the statistics of an iteration in, () each, NaN for none; update at a window's end.

        Every process records every iteration, so that all of them come to the update together.
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
        """Bring the rows of all processes together; all of them must call it at the same time.

        Before a checkpoint, which one process writes for all.
        """
        own = torch.stack([self.iou_hist[self.row], self.err_hist[self.row]])
        ious, errors = gathered_over_processes(own).unbind(dim=1)
        self.iou_hist.copy_(ious)
        self.err_hist.copy_(errors)

    def _update(self) -> None:
        if self.sync:
            self.share()
        rows = slice(None) if self.sync else slice(self.row, self.row + 1)
        ious, errors = self.iou_hist[rows], self.err_hist[rows]
        mean = ious.nanmean()
        threshold = mean.clamp(self.warmup_iou, self.max_iou)
        self.iou_thresh.copy_(torch.where(mean.isnan(), self.iou_thresh, threshold))
        # Not `nanmedian`, which would be the lower of the two middle values.
        median = errors.flatten().nanquantile(0.5)
        keep = median.isnan() | (median < self.eps)
        self.beta.copy_(torch.where(keep, self.beta, median.clamp(max=self.warmup_beta)))
        self.iou_hist.fill_(torch.nan)
        self.err_hist.fill_(torch.nan)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        """Weights of a plain detector have none of it; windows of another shape begin anew."""
        own = {prefix + name: buffer for name, buffer in self.named_buffers()}
        if not own.keys() & state.keys():
            _LOGGER.info("The weights have no statistics of Dynamic R-CNN: they start anew.")
            state.update(own)
        # A checkpointer may have taken out what does not fit.
        histories = [prefix + name for name in ("iou_hist", "err_hist")]
        if any(k not in state or state[k].shape != own[k].shape for k in histories):
            state.update({k: own[k] for k in (*histories, f"{prefix}step")})
        super()._load_from_state_dict(state, prefix, *args)
        self._count = int(self.step)

    def extra_repr(self) -> str:
        """Settings for the printed model."""
        return f"window={self.window}, iou from {self.warmup_iou}, beta from {self.warmup_beta}"
