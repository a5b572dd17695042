"""Several processes: one per GPU, or on CPUs; started here, by ``torchrun``, or by a scheduler.

Detectron2's own ``launch`` insists on CUDA and NCCL.
"""

import gc
import os
import socket
from collections.abc import Callable
from datetime import timedelta
from inspect import signature
from multiprocessing.queues import SimpleQueue
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..compat import create_local_process_group, forget_process_groups
from ..errors import ConfigError, DsrcnnError

__all__ = [
    "Processes",
    "for_all_processes",
    "leave_processes",
    "run_processes",
    "started_by_torchrun",
]

_TIMEOUT = timedelta(minutes=30)


class Processes(NamedTuple):
    """Which processes make up a training.

    Attributes:
        device: type of device, "cuda" or "cpu".
        per_machine: on each machine.
        machines: how many.
        machine_rank: of this one.
        url: where the first machine can be reached; None for one machine.
    """

    device: str
    per_machine: int = 1
    machines: int = 1
    machine_rank: int = 0
    url: str | None = None


def started_by_torchrun() -> bool:
    """Whether somebody has started the processes already and says so in the environment."""
    return {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"} <= {*os.environ}


def run_processes(processes: Processes, work: Callable[..., Any], *args: Any) -> None:
    """Call ``work(*args)`` in every process of a training, and wait for all of them.

    Under ``torchrun`` this process is one of them. A process that dies ends the others.

    Args:
        processes: which ones; ignored under ``torchrun``.
        work: can be pickled.
        args: of `work`.

    Raises:
        DsrcnnError: if one of the processes raises it.
        ProcessRaisedException: if a process raises.
        ProcessExitedException: if a process ends otherwise, killed for example.
    """
    if started_by_torchrun():
        store, rank, world_size = next(dist.rendezvous("env://"))
        # Its addresses are those of the processes before a restart, unless each start has its own.
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        local_rank = int(os.environ["LOCAL_RANK"])
        _join(processes.device, local_rank, rank, world_size, store=store)
        work(*args)
        leave_processes()  # not after an error: it waits for processes that wait
    elif processes.per_machine * processes.machines == 1:
        work(*args)
    else:
        processes = processes._replace(url=processes.url or f"tcp://127.0.0.1:{_free_port()}")
        messages = mp.get_context("spawn").SimpleQueue()
        try:
            mp.spawn(_worker, (processes, messages, work, args), processes.per_machine)
        except (mp.ProcessRaisedException, mp.ProcessExitedException):
            if messages.empty():
                raise
            # The others may have died first, of what this one left.
            raise DsrcnnError(messages.get()) from None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _worker(
    local_rank: int,
    processes: Processes,
    messages: "SimpleQueue[str]",
    work: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    if processes.device == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        # Processes that each take all cores would only get in each other's way.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes.per_machine))
    rank = processes.machine_rank * processes.per_machine + local_rank
    world_size = processes.machines * processes.per_machine
    assert processes.url is not None
    os.environ["LOCAL_WORLD_SIZE"] = str(processes.per_machine)
    _join(processes.device, local_rank, rank, world_size, init_method=processes.url)
    try:
        work(*args)
    except DsrcnnError as error:
        messages.put(str(error))
        raise
    leave_processes()


def _join(device: str, local_rank: int, rank: int, world_size: int, **meeting: Any) -> None:
    """Make this process a member; with CUDA each has its own GPU and they talk by NCCL."""
    if device == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"Process {local_rank} of this machine has no GPU: torch finds "
                f"{torch.cuda.device_count()}. Start as many processes as there are GPUs, or write "
                "MODEL.DEVICE cpu."
            )
        torch.cuda.set_device(local_rank)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=_TIMEOUT, **meeting)
    create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
    comm.synchronize()


def leave_processes() -> None:
    """End this process's membership, and the threads that its groups talk by.

    A thread of gloo that lives on may let go of a tensor, for which it needs the interpreter's
    lock. While the interpreter shuts down that ends the thread, and with it the process ("terminate
    called without an active exception"), after all work is done.
    """
    dist.destroy_process_group()
    forget_process_groups()
    gc.collect()  # the wrapped model holds them too, and cycles hold the model


def for_all_processes(model: nn.Module) -> nn.Module:
    """The model, wrapped so that gradients are averaged over processes if there are several.

    Buffers are not sent around in every step; `average_norms` brings them together when it matters.
    """
    if comm.get_world_size() == 1:
        return model
    device = next(model.parameters()).device
    if device.type == "cpu" and any(isinstance(m, nn.SyncBatchNorm) for m in model.modules()):
        raise ConfigError(
            "A norm of the model is SyncBN, which works on GPUs only, but MODEL.DEVICE is cpu and "
            f"there are {comm.get_world_size()} processes. Write BN, GN or FrozenBN instead."
        )
    # `broadcast_buffers` until torch 2.12; it is deprecated since.
    known = signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {buffers: False}
    return DistributedDataParallel(
        model,
        device_ids=[torch.cuda.current_device()] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        find_unused_parameters=not getattr(model, "trains_every_parameter", True),
        **options,
    )
