"""Checks of the installation and the machine, each a function that returns a `Check`."""

import math
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import cv2
import detectron2
import torch
import torchvision
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from ..compat import has_compiled_extension
from ..engine.setup import package_version
from ..errors import ConfigError
from ..utils.files import prepare_folder
from .complexity import build_loop, load_bare_cfg, random_inputs

_GIB = 2**30
_INSTALL = "docs/INSTALL.md"
# What a model of the quick config becomes in the trial: small, so that a step takes no time.
_TRIAL = ("MODEL.SparseRCNN.NUM_HEADS", 2, "MODEL.SparseRCNN.NUM_PROPOSALS", 8)
_OPENCV = ("opencv-python", "opencv-python-headless", "opencv-contrib-python")
# Optional packages: what installs them and what they are for.
_OPTIONAL = {
    "timm": ("'dsrcnn[timm]'", "backbones of timm"),
    "faster-coco-eval": ("'dsrcnn[eval]'", "COCO metrics several times faster"),
    "supervision": ("'dsrcnn[predict]'", "pictures and videos of dsrcnn predict"),
    "gradio": ("'dsrcnn[app]'", "the page of dsrcnn app"),
    "albumentations": ("'dsrcnn[albumentations]'", "INPUT.AUG.ALBUMENTATIONS"),
}


class Check(NamedTuple):
    """Result of a check.

    Attributes:
        name: what was checked.
        status: "note" is worth knowing, "problem" should be cured.
        text: what there is.
        cure: what to do, if anything.
    """

    name: str
    status: Literal["ok", "note", "problem"]
    text: str
    cure: str = ""


def inspect_environment(folder: str | Path = ".") -> list[Check]:
    """Run all checks; `folder` is where results would be written."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    checks = [check_python(), check_torch(), *check_gpus(), check_torchvision("cpu")]
    if device != "cpu":
        checks.append(check_torchvision(device))
    checks += [check_detectron2(), check_pip(), check_opencv()]
    checks += [
        Check(name, "ok", package_version(name) or "unknown") for name in ("numpy", "Pillow")
    ]
    checks += [check_optional(name) for name in _OPTIONAL]
    checks += [check_threads(), check_memory(), check_shared_memory()]
    return [*checks, check_disk(folder), check_writing(folder), check_training(device)]


def attempt(name: str, work: Callable[[], str], cure: str) -> Check:
    """Run `work`, which returns the text; any error is a problem with that cure."""
    try:
        return Check(name, "ok", work())
    except Exception as error:  # whatever a broken installation raises
        first = next(iter(str(error).splitlines()), "")
        return Check(name, "problem", f"{type(error).__name__}: {first}", cure)


def check_python() -> Check:
    """Name interpreter and operating system."""
    return Check("python", "ok", f"{platform.python_version()}, {platform.platform()}")


def gpu_files() -> list[Path]:
    """List the device files of NVIDIA GPUs, which exist whatever torch finds."""
    return sorted(Path("/dev").glob("nvidia[0-9]*"))


def check_torch() -> Check:
    """Name the build of torch, which must find the GPUs of the machine."""
    cuda, cudnn = torch.version.cuda, torch.backends.cudnn.version()
    build = f"CUDA {cuda}, cuDNN {cudnn}" if cuda else "without CUDA"
    text, gpus = f"{torch.__version__}, {build}", len(gpu_files())
    if torch.cuda.is_available() or not gpus:
        return Check("torch", "ok", text)
    text = f"{text}, does not use the {gpus} GPU(s) of this machine"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not cuda:
        cure = "Install torch and torchvision in one command from the index for your CUDA"
        return Check("torch", "problem", text, f"{cure} ({_INSTALL}).")
    if visible is not None:
        return Check("torch", "note", f"{text}: CUDA_VISIBLE_DEVICES is {visible!r}")
    cure = f"Update the driver, or install a torch for a CUDA older than {cuda}; see nvidia-smi."
    return Check("torch", "problem", text, cure)


def check_gpus() -> list[Check]:
    """Name every GPU that torch finds; the build must have code for it."""
    builds = torch.cuda.get_arch_list()
    checks = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        capability = (device.major, device.minor)
        memory = f"{device.total_memory / _GIB:.0f} GiB"
        name, text = f"cuda:{index}", f"{device.name}, {memory}, compute capability "
        text += ".".join(map(str, capability))
        if runs_on(capability, builds):
            checks.append(Check(name, "ok", text))
        else:
            text += f", for which torch has no code ({', '.join(builds)})"
            cure = f"Install a torch whose CUDA supports this GPU ({_INSTALL})."
            checks.append(Check(name, "problem", text, cure))
    return checks


def runs_on(capability: tuple[int, int], builds: Sequence[str]) -> bool:
    """Whether a GPU runs code for one of `builds`, such as ``sm_80`` or ``compute_90``.

    Binaries run on later GPUs of the same major version, intermediate code on all later ones.
    """
    for build in builds:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)", build)
        if match is None:  # such as sm_90a, for one GPU
            continue
        target = int(match[2]), int(match[3])
        if target <= capability and (match[1] == "compute" or target[0] == capability[0]):
            return True
    return False


def check_torchvision(device: str) -> Check:
    """Run two operators of torchvision on tiny tensors and compare with known results."""
    version = torchvision.__version__
    cure = (
        f"torch {torch.__version__} and torchvision {version} do not fit. Reinstall both in one "
        "command from one index."
    )
    return attempt(f"torchvision on {device}", lambda: _run_operators(device, version), cure)


def _run_operators(device: str, version: str) -> str:
    corners = [[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 9.0], [20.0, 20.0, 30.0, 30.0]]
    boxes = torch.tensor(corners, device=device)
    scores = torch.tensor([0.9, 0.8, 0.7], device=device)
    kept = torchvision.ops.nms(boxes, scores, 0.5).tolist()
    ones = torch.ones(1, 1, 32, 32, device=device)
    pooled = torchvision.ops.roi_align(ones, [boxes], output_size=2)
    if kept != [0, 2] or not torch.allclose(pooled, torch.ones_like(pooled)):
        raise RuntimeError(f"wrong results of nms ({kept}) or roi_align")
    return f"{version}, nms and roi_align work"


def check_detectron2() -> Check:
    """Name Detectron2's version, and whether its operators are compiled."""
    version = detectron2.__version__
    if has_compiled_extension():
        return Check("detectron2", "ok", f"{version}, compiled (_C)")
    text = f"{version}, pure Python (no _C): all of dsrcnn runs, rotated boxes do not"
    return Check("detectron2", "note", text)


def check_pip() -> Check:
    """Check that pip can read the metadata of Detectron2 0.6."""
    version = package_version("pip")
    if version is None:
        return Check("pip", "ok", "not installed")
    numbers = tuple(map(int, re.findall(r"\d+", version)[:2]))
    if numbers < (26, 3) or package_version("pb1-detectron2") is None:
        return Check("pip", "ok", version)
    text = f"{version} refuses an entry in the metadata of Detectron2 0.6"
    return Check("pip", "problem", text, "pip install 'pip<26.3'")


def check_opencv() -> Check:
    """Check that no two distributions of OpenCV overwrite each other."""
    installed = [name for name in _OPENCV if package_version(name)]
    if len(installed) < 2:
        return Check("opencv", "ok", cv2.__version__)
    text = f"{cv2.__version__}; {' and '.join(installed)} overwrite each other"
    cure = f"pip uninstall {' '.join(installed)}, then pip install opencv-python-headless"
    return Check("opencv", "problem", text, cure)


def check_optional(package: str) -> Check:
    """Name the version of an optional package, or what it would be for."""
    version = package_version(package)
    if version:
        return Check(package, "ok", version)
    extra, purpose = _OPTIONAL[package]
    return Check(package, "note", f"not installed ({purpose})", f"pip install {extra}")


def usable_cpus(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Count the CPUs this process may use, by affinity and by the quota of a container."""
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    words = quota.read_text().split() if quota.is_file() else ["max"]
    return count if words[0] == "max" else min(count, math.ceil(int(words[0]) / int(words[1])))


def check_threads() -> Check:
    """Compare torch's threads with the CPUs."""
    cpus, threads = usable_cpus(), torch.get_num_threads()
    text = f"{cpus} CPUs usable of {os.cpu_count()}, {threads} threads"
    if threads > cpus:
        return Check("cpu", "problem", f"{text}, which wait for each other", _set_threads(cpus))
    if threads < cpus and "OMP_NUM_THREADS" in os.environ:
        text += f", as OMP_NUM_THREADS is {os.environ['OMP_NUM_THREADS']}"
        return Check("cpu", "note", text, f"{_set_threads(cpus)} to train faster on the CPU")
    return Check("cpu", "ok", text)


def _set_threads(cpus: int) -> str:
    return f"export OMP_NUM_THREADS={cpus}"


def read_meminfo() -> dict[str, int]:
    """Read Linux' table of memory in bytes; empty elsewhere."""
    path = Path("/proc/meminfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    pairs = (line.split(":") for line in lines)
    return {name: int(value.split()[0]) * 1024 for name, value in pairs}


def check_memory() -> Check:
    """Check that there is main memory for a training."""
    memory = read_meminfo()
    if "MemAvailable" not in memory:
        return Check("memory", "ok", "unknown on this system")
    free, total = memory["MemAvailable"], memory["MemTotal"]
    text = f"{free / _GIB:.1f} GiB available of {total / _GIB:.1f}"
    if free >= 2 * _GIB:
        return Check("memory", "ok", text)
    cure = "End other programs, or lower SOLVER.IMS_PER_BATCH and DATALOADER.NUM_WORKERS."
    return Check("memory", "problem", text, cure)


def check_shared_memory(folder: str = "/dev/shm") -> Check:
    """Check that loader workers, which pass images through shared memory, have room."""
    if not os.path.isdir(folder):
        return Check("shared memory", "ok", f"no {folder} on this system")
    free = shutil.disk_usage(folder).free
    text = f"{free / _GIB:.1f} GiB free in {folder}"
    if free >= _GIB:
        return Check("shared memory", "ok", text)
    cure = "Write DATALOADER.NUM_WORKERS 0, or give the container more (docker run --shm-size 8g)."
    return Check("shared memory", "problem", text, cure)


def check_disk(folder: str | Path) -> Check:
    """Check that there is room for checkpoints."""
    free = shutil.disk_usage(folder).free
    text = f"{free / _GIB:.1f} GiB free in {Path(folder).resolve()}"
    if free >= 10 * _GIB:
        return Check("disk", "ok", text)
    # An R50 with the state of AdamW takes 1.2 GiB, and SOLVER.CHECKPOINTS_KEPT are kept.
    status: Literal["note", "problem"] = "note" if free >= 2 * _GIB else "problem"
    return Check("disk", status, text, "Make room, or set OUTPUT_DIR to another disk.")


def check_writing(folder: str | Path) -> Check:
    """Write to the folder as a training does."""
    try:
        prepare_folder(folder, "The working folder")
    except ConfigError as error:
        return Check("writing", "problem", str(error), "Change to another one, or set OUTPUT_DIR.")
    return Check("writing", "ok", "files can be written to the working folder")


def check_training(device: str) -> Check:
    """Build a tiny model and train it for one step."""
    cure = f"See {_INSTALL}, By symptom."
    return attempt(f"training on {device}", lambda: _train_step(device), cure)


def _train_step(device: str) -> str:
    start = time.perf_counter()
    cfg, _ = load_bare_cfg("quick/sparse_rcnn_shapes", [*_TRIAL, "MODEL.DEVICE", device])
    with EventStorage():
        loop = build_loop(cfg, build_model(cfg), random_inputs(cfg, (64, 64), images=2))
        loop.run_step()
        loop.read_losses()  # on GPUs not yet read: errors of the device would go unseen
    return f"a tiny model was built and trained for a step in {time.perf_counter() - start:.1f} s"
