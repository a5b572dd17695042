"""One training step: forward, check, backward, clip, update."""

import time
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer

from ..errors import NonFiniteLossError
from ..solver import clip_full_model

__all__ = ["TrainLoop"]


class TrainLoop(SimpleTrainer):
    """Detectron2's loop plus mixed precision, full-model clipping and a check of the loss.

    Gradients are unscaled, then clipped, then applied, so clipping sees their true size also under
    a gradient scaler. A loss that is not finite stops training before it touches the weights.
    """

    clip_norm: float | None
    norm_type: float
    amp: bool
    scaler: torch.amp.GradScaler

    @classmethod
    def take_over(cls, base: SimpleTrainer, cfg: CfgNode) -> "TrainLoop":
        """Continue with the model, loader and optimizer of `base`.

        Its state is taken instead of building it again: Detectron2 0.6 starts the loader's workers
        in the constructor, so a second construction would start a second set.
        """
        loop = cls.__new__(cls)
        loop.__dict__.update(vars(base))
        clip = cfg.SOLVER.CLIP_GRADIENTS
        full = clip.ENABLED and clip.CLIP_TYPE == "full_model"
        loop.clip_norm = clip.CLIP_VALUE if full else None
        loop.norm_type = clip.NORM_TYPE
        loop.amp = cfg.SOLVER.AMP.ENABLED
        device = torch.device(cfg.MODEL.DEVICE).type
        # bfloat16, the half precision of CPUs, has the range of float32 and needs no scaling.
        loop.scaler = torch.amp.GradScaler(device, enabled=loop.amp and device == "cuda")
        return loop

    def run_step(self) -> None:
        """Train on one batch.

        Raises:
            NonFiniteLossError: if the loss is infinite or NaN; weights are as before the step.
        """
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        device = next(self.model.parameters()).device.type
        dtype = torch.float16 if device == "cuda" else torch.bfloat16
        with torch.autocast(device, dtype, enabled=self.amp):
            losses = self.model(batch)
        total = sum(losses.values())
        stacked = torch.stack(list(losses.values())).detach().cpu()  # the one read of the step
        values = dict(zip(losses, stacked, strict=True))
        if not torch.isfinite(stacked).all():
            raise NonFiniteLossError(self._describe(values, batch))
        self.optimizer.zero_grad()
        self.scaler.scale(total).backward()
        self._write_metrics(values, data_time)
        self.scaler.unscale_(self.optimizer)
        if self.clip_norm is not None:
            clip_full_model(self.optimizer, self.clip_norm, self.norm_type)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _describe(self, losses: dict[str, torch.Tensor], batch: list[dict[str, Any]]) -> str:
        values = ", ".join(f"{k} {v.item():.4g}" for k, v in losses.items())
        files = ", ".join(str(record.get("file_name", "?")) for record in batch)
        return (
            f"The loss is not finite at iteration {self.iter}: {values}. Images: {files}. "
            "A learning rate too high for the batch size is the usual cause: lower SOLVER.BASE_LR "
            "(0.000025 is meant for 16 images)."
        )

    def state_dict(self) -> dict[str, Any]:
        """State for the checkpoint, with the gradient scaler's."""
        return {**super().state_dict(), "grad_scaler": self.scaler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave; checkpoints without a scaler leave it as it is."""
        super().load_state_dict(state_dict)
        if self.scaler.is_enabled() and state_dict.get("grad_scaler"):
            self.scaler.load_state_dict(state_dict["grad_scaler"])
