"""Training in several processes, on GPUs or CPUs, started here or by ``torchrun``.

Detectron2's ``launch`` requires CUDA and NCCL.
"""

import gc
import logging
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from inspect import signature
from multiprocessing import connection
from multiprocessing.queues import SimpleQueue
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from ..compat import create_local_process_group, forget_process_groups
from ..errors import ConfigError, DsrcnnError, TrainingInterrupted
from ..utils.training import TrainableModel
from .interrupt import forwarded_signals

# What gloo, NCCL and torch's store say when they have waited long enough, or when a process that
# has waited long enough has closed its connection.
_WAITED = re.compile(r"tim(ed|e) ?out", re.IGNORECASE)


class Processes(NamedTuple):
    """Processes of a training run."""

    device: str  # type of device, "cuda" or "cpu"
    per_machine: int = 1
    machines: int = 1
    machine_rank: int = 0  # of this machine
    url: str | None = None  # address of the first machine; None for one machine
    timeout: float = 1800.0  # seconds that they wait for each other, ``DISTRIBUTED_TIMEOUT``


class _Report(NamedTuple):
    """Report of a process that a signal or an error of this package ends."""

    signal: int | None  # None for an error
    text: str  # empty for a signal to another process than the main one, which saves the state


def started_by_torchrun() -> bool:
    """Whether the environment describes processes that are already running."""
    return {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"} <= {*os.environ}


def run_processes(processes: Processes, work: Callable[..., Any], *args: Any) -> None:
    """Call ``work(*args)`` in every process of a training run and wait for all of them.

    Under ``torchrun`` this process is one of them, and only ``processes.device`` and ``.timeout``
    are used. When one process dies or hangs, the rest are stopped. `work` and `args` must be
    possible to pickle.

    Raises:
        DsrcnnError: if a process raises it, or has waited too long for another one.
        TrainingInterrupted: if a signal ended the run.
        ProcessRaisedException: if a process raises another error.
        ProcessExitedException: if a process ends otherwise, such as by a signal.
    """
    if started_by_torchrun():
        with _explained_waiting(processes):
            store, rank, world_size = next(dist.rendezvous("env://"))
            # After a restart the store still has the addresses of the processes before it.
            start = f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
            store = dist.PrefixStore(start, store)
            local_rank = int(os.environ["LOCAL_RANK"])
            _join(processes, local_rank, rank, world_size, store=store)
            work(*args)
        shutdown_distributed()  # not after an error, when it would wait for stuck processes
    elif processes.per_machine * processes.machines == 1:
        work(*args)
    else:
        if not processes.url:
            with socket.socket() as probe:  # to find a free port
                probe.bind(("127.0.0.1", 0))
                url = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
            processes = processes._replace(url=url)
        # It warns of every process that it ends.
        logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
        reports: SimpleQueue[_Report] = mp.get_context("spawn").SimpleQueue()
        arguments = (processes, reports, work, args)
        context = mp.spawn(_worker, arguments, processes.per_machine, join=False)
        assert context is not None
        # When a process fails, `join` ends the others by SIGTERM, which they report like a signal
        # to the run. So the cause is in what was reported before.
        causes: list[_Report] = []
        failure: Exception | None = None
        with forwarded_signals(context.pids()) as signals:
            try:
                while context.sentinels:
                    connection.wait(context.sentinels)
                    causes += _received(reports)
                    context.join()
            except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
                failure = error
        if signals:
            causes = [_Report(signals[0], ""), *causes, *_received(reports)]
        _raise_cause(causes, failure)


def _received(reports: "SimpleQueue[_Report]") -> Iterator[_Report]:
    while not reports.empty():
        yield reports.get()


def _raise_cause(reports: list[_Report], failure: Exception | None) -> None:
    """Raise what has ended the processes first; nothing after a complete run.

    A `failure` without a report is of a process that was killed or has a defect. After a report it
    is of the broken connection to the process that has ended.
    """
    if not reports:
        if failure is not None:
            raise failure
        return
    number, text = reports[0]
    if number is None:
        raise DsrcnnError(text)
    default = f"{TrainingInterrupted(number)} --resume continues from the last checkpoint."
    raise TrainingInterrupted(number, next((r.text for r in reports if r.text), default))


def _worker(
    local_rank: int,
    processes: Processes,
    reports: "SimpleQueue[_Report]",
    work: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    if processes.device == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        # By default every process would use all cores.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes.per_machine))
    # By default tqdm creates a semaphore, which a process that is killed leaves behind.
    tqdm.set_lock(threading.RLock())
    rank = processes.machine_rank * processes.per_machine + local_rank
    world_size = processes.machines * processes.per_machine
    assert processes.url is not None
    os.environ["LOCAL_WORLD_SIZE"] = str(processes.per_machine)
    try:
        with _explained_waiting(processes):
            _join(processes, local_rank, rank, world_size, init_method=processes.url)
            work(*args)
    except TrainingInterrupted as stop:
        reports.put(_Report(stop.signal, str(stop) if comm.is_main_process() else ""))
    except DsrcnnError as error:
        reports.put(_Report(None, str(error)))
        raise
    shutdown_distributed()


@contextmanager
def _explained_waiting(processes: Processes) -> Iterator[None]:
    """Turn torch's error about another process that does not answer into a `DsrcnnError`.

    Raises:
        DsrcnnError: if this process has waited too long.
    """
    try:
        yield
    except DsrcnnError:
        raise
    except RuntimeError as error:
        if not _WAITED.search(str(error)):
            raise
        raise DsrcnnError(
            f"Another process has not answered for {processes.timeout:g} seconds "
            "(DISTRIBUTED_TIMEOUT), so it hangs, has died or has never started. See log.txt.rank* "
            "in OUTPUT_DIR; --resume continues from the last checkpoint."
        ) from error


def _join(
    processes: Processes, local_rank: int, rank: int, world_size: int, **rendezvous: Any
) -> None:
    """Join the process group, with NCCL and one GPU per process, or with gloo."""
    device = processes.device
    if device == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"Process {local_rank} of this machine has no GPU: torch finds "
                f"{torch.cuda.device_count()}. Start as many processes as there are GPUs, or write "
                "MODEL.DEVICE cpu."
            )
        torch.cuda.set_device(local_rank)
    options = {"rank": rank, "world_size": world_size, **rendezvous}
    options["timeout"] = timedelta(seconds=processes.timeout)
    try:
        dist.init_process_group("nccl" if device == "cuda" else "gloo", **options)
    except (OSError, ValueError, RuntimeError) as error:
        if _WAITED.search(str(error)):
            raise
        reason = (str(error).splitlines() or [""])[0]
        raise DsrcnnError(
            f"Process {rank} cannot meet the others at {processes.url or 'MASTER_ADDR'}: {reason} "
            "Correct --dist-url, or take another port."
        ) from error
    create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
    comm.synchronize()


def shutdown_distributed() -> None:
    """Destroy the process groups and end their threads.

    A gloo thread that releases a tensor while the interpreter shuts down cannot take the
    interpreter's lock and aborts the process ("terminate called without an active exception").
    """
    dist.destroy_process_group()
    forget_process_groups()
    gc.collect()  # the wrapped model references the groups, and cycles reference the model


def wrap_ddp(model: nn.Module) -> nn.Module:
    """Wrap a model to average gradients over processes, if there are several.

    Buffers are not synchronized in every step; `average_norms` does it before they are used.

    Raises:
        ConfigError: if a norm is SyncBN and the model is on the CPU.
    """
    if comm.get_world_size() == 1:
        return model
    device = next(model.parameters()).device
    if device.type == "cpu" and any(isinstance(m, nn.SyncBatchNorm) for m in model.modules()):
        raise ConfigError(
            "A norm of the model is SyncBN, which needs GPUs, but MODEL.DEVICE is cpu and there "
            f"are {comm.get_world_size()} processes. Write BN, GN or FrozenBN instead."
        )
    # `broadcast_buffers` is deprecated since torch 2.12.
    parameters = signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"
    options: dict[str, Any] = {name: False}
    all_used = not isinstance(model, TrainableModel) or model.all_parameters_get_gradients
    return DistributedDataParallel(
        model,
        device_ids=[torch.cuda.current_device()] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        find_unused_parameters=not all_used,
        **options,
    )
