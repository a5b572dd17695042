"""One training iteration: forward and backward by parts, check, clip, update."""

import contextlib
import math
import random
import time
from collections.abc import Iterable, Iterator
from typing import Any, cast

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.engine.train_loop import TrainerBase
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from ..data.samplers import mixed_seed
from ..errors import NonFiniteLossError
from ..solver import clip_full_model
from ..utils.distributed import mean_over_processes

__all__ = ["TrainLoop", "unwrapped"]

_Batch = list[dict[str, Any]]


class TrainLoop(TrainerBase):
    """Mixed precision, accumulation, clipping and a check of losses and gradients.

    Gradients are unscaled, then clipped, then applied, so clipping sees their true size also under
    a gradient scaler. Losses or gradients that are not finite stop training before they touch the
    weights, on all processes at once. Random numbers of an iteration follow from the seed, the
    iteration and the process, so a resumed run draws the same ones.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[_Batch],
        optimizer: torch.optim.Optimizer,
        *,
        device: torch.device,
        precision: torch.dtype = torch.float32,
        accumulate: int = 1,
        clip_norm: float = math.inf,
        norm_type: float = 2.0,
        seed: int = 0,
    ) -> None:
        """Set the loop up.

        Args:
            model: batch to a dictionary of losses; may be wrapped for several processes.
            data_loader: endless; iteration starts with the first step.
            optimizer: of the model.
            device: where the model is.
            precision: of autocast; float16 comes with a gradient scaler, float32 is none.
            accumulate: parts that a batch is processed in.
            clip_norm: largest norm of all gradients together.
            norm_type: order of that norm.
            seed: of random numbers.
        """
        super().__init__()
        model.train()
        self.model = model
        self.data_loader = data_loader
        self.optimizer = optimizer
        self.device = device
        self.precision = precision
        self.accumulate = accumulate
        self.clip_norm = clip_norm
        self.norm_type = norm_type
        self.seed = seed
        # bfloat16 has the range of float32 and needs no scaling.
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
        self._batches: Iterator[_Batch] | None = None

    @classmethod
    def from_config(
        cls,
        cfg: CfgNode,
        model: nn.Module,
        data_loader: Iterable[_Batch],
        optimizer: torch.optim.Optimizer,
    ) -> "TrainLoop":
        """Read `SOLVER` and `MODEL.DEVICE`."""
        solver, clip = cfg.SOLVER, cfg.SOLVER.CLIP_GRADIENTS
        precisions = {"bf16": torch.bfloat16, "fp16": torch.float16}
        full = clip.ENABLED and clip.CLIP_TYPE == "full_model"
        return cls(
            model,
            data_loader,
            optimizer,
            device=torch.device(cfg.MODEL.DEVICE),
            precision=precisions[solver.AMP.PRECISION] if solver.AMP.ENABLED else torch.float32,
            accumulate=solver.ACCUMULATE,
            clip_norm=clip.CLIP_VALUE if full else math.inf,
            norm_type=clip.NORM_TYPE,
            seed=max(cfg.SEED, 0),
        )

    def run_step(self) -> None:
        """Train on one batch.

        Raises:
            NonFiniteLossError: if losses or gradients are infinite or NaN; weights are as before.
        """
        start = time.perf_counter()
        if self._batches is None:
            self._batches = iter(self.data_loader)
        batch = next(self._batches)
        data_time = time.perf_counter() - start
        self._seed_iteration()
        self.optimizer.zero_grad()
        losses = self._backward(batch)
        self.scaler.unscale_(self.optimizer)
        norm = clip_full_model(self.optimizer, self.clip_norm, self.norm_type)
        self._check_and_log(losses, norm, batch, data_time)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _backward(self, batch: _Batch) -> dict[str, Tensor]:
        """Gradients of the whole batch; returns its losses."""
        size = math.ceil(len(batch) / self.accumulate)
        parts = [batch[i : i + size] for i in range(0, len(batch), size)]
        arguments, factors = self._how_parts_add_up(parts)
        sums: dict[str, Tensor] = {}
        for number, (part, factor) in enumerate(zip(parts, factors, strict=True), start=1):
            is_last = number == len(parts)
            if arguments:
                arguments["ends_iteration"] = is_last
            with self._synchronized(is_last):
                with self._autocast():
                    losses = self.model(part, **arguments)
                total = sum(losses.values()) * factor
                self.scaler.scale(total).backward()
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach().float() * factor
        return sums

    def _how_parts_add_up(self, parts: list[_Batch]) -> tuple[dict[str, Any], list[float]]:
        """Arguments for the model, and factors that make losses of parts those of the batch.

        A model that can count beforehand what its losses are divided by is exact; the losses of
        others are averaged over the images.
        """
        count = getattr(unwrapped(self.model), "loss_normalizers", None)
        if len(parts) == 1:
            return {}, [1.0]
        if count is None:
            images = sum(len(part) for part in parts)
            return {}, [len(part) / images for part in parts]
        with self._autocast():
            normalizers = count(parts)
        self._seed_iteration()  # dropout has to leave out the same again
        return {"normalizers": normalizers}, [1.0] * len(parts)

    def _autocast(self) -> contextlib.AbstractContextManager:
        enabled = self.precision != torch.float32
        return torch.autocast(self.device.type, self.precision, enabled=enabled)

    def _synchronized(self, is_last: bool) -> contextlib.AbstractContextManager:
        """Gradients are averaged over processes once, after the last part."""
        if is_last or not isinstance(self.model, nn.parallel.DistributedDataParallel):
            return contextlib.nullcontext()
        return self.model.no_sync()

    def _seed_iteration(self) -> None:
        seed = mixed_seed(self.seed, self.iter, comm.get_rank())
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)

    def _check_and_log(
        self, losses: dict[str, Tensor], norm: Tensor, batch: _Batch, data_time: float
    ) -> None:
        """Read losses and gradient norm from the device, once, as means over processes."""
        own = torch.stack([*losses.values(), norm.float()])
        values, means = torch.stack([own, mean_over_processes(own)]).tolist()
        *shared, norm_value = means
        # Gradients were averaged over processes: their norm is the same on all of them. Infinite
        # ones are part of float16, and skipped by the scaler.
        harmless = self.scaler.is_enabled() and self.scaler.get_scale() > _SMALLEST_SCALE
        if not (np.isfinite(shared).all() and (math.isfinite(norm_value) or harmless)):
            raise NonFiniteLossError(self._describe(dict(zip(losses, values, strict=False)), batch))
        storage = get_event_storage()
        storage.put_scalars(
            data_time=data_time, total_loss=sum(shared), **dict(zip(losses, shared, strict=True))
        )
        if math.isfinite(norm_value):
            storage.put_scalar("gradient_norm", norm_value)

    def _describe(self, losses: dict[str, float], batch: _Batch) -> str:
        what = "The loss is not finite"
        where = f" Images: {', '.join(str(record.get('file_name', '?')) for record in batch)}."
        if np.isfinite(list(losses.values())).all():
            what, where = "The gradients are not finite, or the loss of another process", ""
        values = ", ".join(f"{k} {v:.4g}" for k, v in losses.items())
        return (
            f"{what} at iteration {self.iter}: {values}.{where} "
            "A learning rate too high for the batch size is the usual cause: lower SOLVER.BASE_LR "
            "(0.000025 is meant for 16 images)."
        )

    def state_dict(self) -> dict[str, Any]:
        """State for the checkpoint: optimizer and gradient scaler."""
        return {
            **super().state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "grad_scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave; checkpoints without a scaler leave it as it is."""
        super().load_state_dict(state_dict)
        self.optimizer.load_state_dict(state_dict["optimizer"])
        if self.scaler.is_enabled() and state_dict.get("grad_scaler"):
            self.scaler.load_state_dict(state_dict["grad_scaler"])


_SMALLEST_SCALE = 1e-4  # gradients that are infinite even so do not come from float16


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, without what wraps it for several processes."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return cast(nn.Module, model.module)
    return model
