"""One training iteration: forward and backward passes, checks, clipping, update."""

import contextlib
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, cast

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.engine.train_loop import TrainerBase
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, get_event_storage
from torch import Tensor, nn

from ..data.samplers import derive_seed
from ..errors import NonFiniteLossError
from ..solver import clip_full_model
from ..utils.distributed import reduce_mean
from ..utils.training import TrainableModel, use_training_context
from .memory import describe_batch, explain_memory, is_out_of_memory, memory_advice, memory_keys
from .resume import check_optimizer_state

_Batch = list[dict[str, Any]]

_MIN_SCALE = 1e-4  # gradients that are infinite at this scale are not so because of float16


@dataclass(eq=False)
class TrainLoop(TrainerBase):
    """Training with mixed precision, gradient accumulation, clipping and checks for NaN.

    Gradients are unscaled, then clipped, then applied, so clipping sees their true size under a
    gradient scaler. Losses or gradients that are not finite end training on all processes before
    they reach the weights. The random numbers of an iteration depend on the seed, the iteration and
    the process only, so a resumed run draws the same ones.

    On a GPU, losses are read one iteration later, when the device has computed the next one's, so
    the host never waits for the device to run dry. Until then the device itself keeps a loss that
    is not finite from the weights: a fused optimizer skips its step. `read_losses` reads at once.

    Attributes:
        model: maps a batch to a dictionary of losses; may be wrapped by `wrap_ddp`.
        data_loader: endless; iteration starts with the first step.
        optimizer: of the model.
        device: device of the model.
        precision: of autocast; float16 uses a gradient scaler, float32 disables autocast.
        accumulate: number of parts a batch is processed in.
        clip_norm: largest norm of all gradients together.
        norm_type: order of that norm.
        seed: seed of the random numbers.
        memory_keys: what a message advises if memory runs out; see `memory_keys`.
        reads_late: whether losses are read one iteration later. None: on CUDA, if the optimizer is
            fused and there is no gradient scaler, which needs them earlier.
        stop_requested: returns whether this process should stop.
        stops: whether any process should stop, as of the last losses read; equal on all of them.
        in_step: whether a step has begun and not ended, so the state is that of no iteration.
    """

    model: nn.Module
    data_loader: Iterable[_Batch]
    optimizer: torch.optim.Optimizer
    _: KW_ONLY
    device: torch.device
    precision: torch.dtype
    accumulate: int
    clip_norm: float
    norm_type: float
    seed: int
    memory_keys: Sequence[str] = ("smaller images",)
    reads_late: bool | None = None
    stop_requested: Callable[[], bool] = field(default=lambda: False)
    stops: bool = field(default=False, init=False)
    in_step: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        """Set the model to training mode and build the gradient scaler."""
        super().__init__()
        self.model.train()
        # bfloat16 has the range of float32 and needs no scaling.
        scales = self.precision == torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=scales)
        self._batches: Iterator[_Batch] | None = None
        # The protocol between gradient scalers and fused optimizers, which skip a step on the
        # device where their `found_inf` is 1.
        can_skip = getattr(self.optimizer, "_step_supports_amp_scaling", False)
        if self.reads_late is None:
            self.reads_late = self.device.type == "cuda" and can_skip and not scales
        if self.reads_late and (scales or not can_skip):
            raise ValueError("reads_late needs a fused optimizer and no gradient scaler")
        self._unread: _Losses | None = None

    @classmethod
    def from_config(
        cls,
        cfg: CfgNode,
        model: nn.Module,
        data_loader: Iterable[_Batch],
        optimizer: torch.optim.Optimizer,
    ) -> "TrainLoop":
        """Build the loop with the settings of ``SOLVER``, ``MODEL.DEVICE`` and ``SEED``."""
        solver, clip = cfg.SOLVER, cfg.SOLVER.CLIP_GRADIENTS
        precisions = {"bf16": torch.bfloat16, "fp16": torch.float16}
        clips_full_model = clip.ENABLED and clip.CLIP_TYPE == "full_model"
        return cls(
            model,
            data_loader,
            optimizer,
            device=torch.device(cfg.MODEL.DEVICE),
            precision=precisions[solver.AMP.PRECISION] if solver.AMP.ENABLED else torch.float32,
            accumulate=solver.ACCUMULATE,
            clip_norm=clip.CLIP_VALUE if clips_full_model else math.inf,
            norm_type=clip.NORM_TYPE,
            seed=max(cfg.SEED, 0),
            memory_keys=memory_keys(cfg),
        )

    def run_step(self) -> None:
        """Train on one batch.

        Raises:
            NonFiniteLossError: if losses or gradients are infinite or NaN, of the iteration before
                if they are read late; the weights never take such a step.
            OutOfMemoryError: if memory runs out. Before the update, ``in_step`` is false again: the
                weights are those of the iteration before.
        """
        start = time.perf_counter()
        if self._batches is None:
            self._batches = iter(self.data_loader)
        batch = next(self._batches)
        with explain_memory(lambda: self._explain_memory(batch)):
            self._run_step(batch, start)

    def _run_step(self, batch: _Batch, start: float) -> None:
        self.in_step = True
        data_time = time.perf_counter() - start
        self._seed_iteration()
        self.optimizer.zero_grad()
        try:
            losses = self._backward(batch)
        except (RuntimeError, MemoryError) as error:
            self.in_step = not is_out_of_memory(error)
            raise
        self.scaler.unscale_(self.optimizer)
        norm = clip_full_model(self.optimizer, self.clip_norm, self.norm_type)
        self.read_losses()  # of the iteration before
        self._unread = self._collect(losses, norm, batch, data_time)
        if self.reads_late:
            self._skip_unless_finite(self._unread)
        else:
            self.read_losses()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.in_step = False

    def _explain_memory(self, batch: _Batch) -> str:
        self.optimizer.zero_grad()  # a checkpoint may be written next
        advice = memory_advice(len(batch), self.accumulate, self.memory_keys)
        parts = f" in {self.accumulate} parts" if self.accumulate > 1 else ""
        return f"at iteration {self.iter} with {describe_batch(batch)}{parts}. {advice}"

    def _backward(self, batch: _Batch) -> dict[str, Tensor]:
        """Compute the gradients of the batch, part by part, and return its losses."""
        size = math.ceil(len(batch) / self.accumulate)
        parts = [batch[i : i + size] for i in range(0, len(batch), size)]
        normalizers, factors = self._normalize(parts)
        sums: dict[str, Tensor] = {}
        for number, (part, factor) in enumerate(zip(parts, factors, strict=True), start=1):
            is_last = number == len(parts)
            context = use_training_context(normalizers=normalizers, ends_iteration=is_last)
            # Gradients are averaged over processes only once, after the last part.
            model = self.model
            waits = not is_last and isinstance(model, nn.parallel.DistributedDataParallel)
            with context, cast(Any, model).no_sync() if waits else contextlib.nullcontext():
                with self._autocast():
                    losses = self.model(part)
                total = sum(losses.values()) * factor
                self.scaler.scale(total).backward()
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach().float() * factor
        return sums

    def _normalize(self, parts: list[_Batch]) -> tuple[Any, list[float]]:
        """Return normalizers and factors with which the losses of the parts sum to the batch's.

        This is exact for a `TrainableModel`; the losses of other models are averaged over images.
        """
        if len(parts) == 1:
            return None, [1.0]
        model = unwrapped(self.model)
        if not isinstance(model, TrainableModel):
            images = sum(len(part) for part in parts)
            return None, [len(part) / images for part in parts]
        with self._autocast():
            normalizers = model.loss_normalizers(parts)
        self._seed_iteration()  # dropout must draw the same numbers again
        return normalizers, [1.0] * len(parts)

    def _autocast(self) -> contextlib.AbstractContextManager:
        enabled = self.precision != torch.float32
        return torch.autocast(self.device.type, self.precision, enabled=enabled)

    def _seed_iteration(self) -> None:
        seed = derive_seed(self.seed, self.iter, comm.get_rank())
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)

    def _collect(
        self, losses: dict[str, Tensor], norm: Tensor, batch: _Batch, data_time: float
    ) -> "_Losses":
        """Gather losses, gradient norm and requests to stop, and their means over processes."""
        stop = torch.full_like(norm, self.stop_requested(), dtype=torch.float32)
        local = torch.stack([*losses.values(), norm.float(), stop])
        values = torch.stack([local, reduce_mean(local)])
        images = [str(x.get("file_name", "?")) if isinstance(x, dict) else "?" for x in batch]
        return _Losses(self.iter, list(losses), values, images, data_time, get_event_storage())

    def _skip_unless_finite(self, losses: "_Losses") -> None:
        """Let the device skip the step if a loss or the gradients are not finite."""
        skipped = ~torch.isfinite(losses.values[1]).all()
        optimizer = cast(Any, self.optimizer)
        optimizer.grad_scale, optimizer.found_inf = None, skipped.float()

    def read_losses(self) -> None:
        """Read and log the losses of the last iteration, if they are not read yet.

        Raises:
            NonFiniteLossError: if losses or gradients are infinite or NaN; the weights are those
                before that iteration.
        """
        losses, self._unread = self._unread, None
        if losses is None:
            return
        values, (*means, norm, stop) = losses.read()
        self.stops = stop > 0
        # Gradients were averaged over processes, so their norm is the same on all of them. With
        # float16 infinite ones are normal, and skipped by the scaler.
        is_skipped = self.scaler.is_enabled() and self.scaler.get_scale() > _MIN_SCALE
        if not (np.isfinite(means).all() and (math.isfinite(norm) or is_skipped)):
            raise NonFiniteLossError(losses.describe(values))
        storage = losses.storage
        now, storage.iter = storage.iter, losses.iteration
        scalars = dict(zip(losses.names, means, strict=True))
        storage.put_scalars(data_time=losses.data_time, total_loss=sum(means), **scalars)
        if math.isfinite(norm):
            storage.put_scalar("gradient_norm", norm)
        storage.iter = now

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the optimizer and the gradient scaler."""
        state = {"optimizer": self.optimizer.state_dict(), "grad_scaler": self.scaler.state_dict()}
        return {**super().state_dict(), **state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the result of `state_dict`; a checkpoint may lack the scaler."""
        super().load_state_dict(state_dict)
        check_optimizer_state(self.optimizer, state_dict["optimizer"])
        self.optimizer.load_state_dict(state_dict["optimizer"])
        if self.scaler.is_enabled() and state_dict.get("grad_scaler"):
            self.scaler.load_state_dict(state_dict["grad_scaler"])


@dataclass
class _Losses:
    """Losses of one iteration on their way from the device.

    Attributes:
        iteration: they belong to.
        names: of the losses.
        values: of this process and means over processes, (2, losses + 2); the last two columns
            are the norm of the gradients and the requests to stop.
        images: files of the batch.
        data_time: seconds the iteration waited for its batch.
        storage: where they are logged, also if training has ended when they are read.
    """

    iteration: int
    names: list[str]
    values: Tensor
    images: list[str]
    data_time: float
    storage: EventStorage

    def __post_init__(self) -> None:
        """Start the copy, which does not wait for the device."""
        self._copy = self.values.to("cpu", non_blocking=True)
        self._copied: torch.cuda.Event | None = None
        if self.values.is_cuda:
            self._copied = torch.cuda.current_stream(self.values.device).record_event()

    def read(self) -> list[list[float]]:
        """Return the rows of `values` when they have arrived."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._copy.tolist()

    def describe(self, values: list[float]) -> str:
        """Explain which of this process's `values` is not finite, and what to do."""
        losses = dict(zip(self.names, values, strict=False))
        problem = "The loss is not finite"
        images = f" Images: {', '.join(self.images)}."
        if np.isfinite(list(losses.values())).all():
            problem, images = "The gradients are not finite, or the loss of another process", ""
        text = ", ".join(f"{k} {v:.4g}" for k, v in losses.items())
        return (
            f"{problem} at iteration {self.iteration}: {text}.{images} "
            "A learning rate too high for the batch size is the usual cause: lower SOLVER.BASE_LR "
            "(0.000025 is meant for 16 images)."
        )


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside a wrapper of `wrap_ddp`."""
    is_wrapped = isinstance(model, nn.parallel.DistributedDataParallel)
    return cast(nn.Module, model.module) if is_wrapped else model
