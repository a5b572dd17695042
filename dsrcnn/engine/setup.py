"""What a run depends on besides its config: recorded, and made deterministic on request."""

import json
import logging
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.utils import comm

from ..data.build import training_records
from ..solver import scale_learning_rate, use_epochs
from ..version import __version__

__all__ = [
    "final_recipe",
    "keep_drawn_seed",
    "make_deterministic",
    "record_environment",
    "warn_of_few_images",
]

_PACKAGES = ("torch", "torchvision", "numpy", "scipy", "Pillow", "pycocotools", "faster-coco-eval")


def record_environment(cfg: CfgNode) -> None:
    """Append command, versions, machine and state of the code to ``environment.jsonl``.

    One line for every start, so that a run that was resumed elsewhere shows it.
    """
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    entry = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": sys.argv,
        "seed": cfg.SEED,
        "processes": comm.get_world_size(),
        "device": cuda or f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)",
        "python": platform.python_version(),
        "dsrcnn": __version__,
        "packages": {name: _version(name) for name in _PACKAGES},
        **_git_state(),
    }
    with (Path(cfg.OUTPUT_DIR) / "environment.jsonl").open("a") as file:
        file.write(json.dumps(entry) + "\n")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_state() -> dict[str, object]:
    """Commit of the package and whether files differ from it; empty outside a clone."""
    root = Path(__file__).resolve().parents[2]

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *words], cwd=root, capture_output=True, text=True, check=True, timeout=10
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain")
    return {} if commit is None else {"commit": commit, "changed": bool(changes)}


def make_deterministic() -> None:
    """Ask torch for algorithms that give the same numbers every time, on GPUs too.

    Where it has none, it warns and goes on. On a CPU nothing changes: there results are the same
    anyway for the same number of threads.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)


_LOGGER = logging.getLogger(__name__)


def keep_drawn_seed(cfg: CfgNode) -> None:
    """Where ``SEED`` is drawn and a run goes on: take what was drawn at its start, in place."""
    folder = Path(cfg.OUTPUT_DIR)
    if cfg.SEED < 0 and (folder / "last_checkpoint").is_file():
        saved = folder / "config.yaml"
        if saved.is_file():
            cfg.SEED = CfgNode.load_yaml_with_base(str(saved), allow_unsafe=False)["SEED"]


def warn_of_few_images(cfg: CfgNode) -> None:
    """DPG cannot learn from batches, or parts of them, of two or three images; say so."""
    dpg = cfg.MODEL.SparseRCNN.DPG
    images = cfg.SOLVER.IMS_PER_BATCH // cfg.SOLVER.ACCUMULATE
    if dpg.ENABLED and dpg.LOGIT_NORM and images < _FEWEST_IMAGES:
        _LOGGER.warning(
            "DPG compares the %d images of a step (SOLVER.IMS_PER_BATCH / SOLVER.ACCUMULATE) with "
            "each other; below %d it learns little or nothing. Raise the one or lower the other, "
            "or save memory by MODEL.CHECKPOINT instead.",
            *(images, _FEWEST_IMAGES),
        )


_FEWEST_IMAGES = 4


def final_recipe(cfg: CfgNode) -> CfgNode:
    """A frozen config whose ``SOLVER`` needs no further interpretation; doing it twice is harmless.

    In this order: ``REFERENCE_WORLD_SIZE`` (Detectron2's rule: as many images per process as
    before), ``EPOCHS``, ``REFERENCE_BATCH``, a seed where ``SEED`` is below 0.

    Args:
        cfg: from `load_cfg`; not changed.

    Raises:
        ConfigError: if the numbers cannot work.
        DataError: if the data are needed to count epochs and cannot be read.
    """
    batch = cfg.SOLVER.IMS_PER_BATCH
    cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size()).clone()
    cfg.defrost()
    # It has scaled BASE_LR with the batch, so that is meant for more images now.
    cfg.SOLVER.REFERENCE_BATCH = round(
        cfg.SOLVER.REFERENCE_BATCH * cfg.SOLVER.IMS_PER_BATCH / batch
    )
    if cfg.SOLVER.EPOCHS.MAX:
        use_epochs(cfg, len(training_records(cfg)))
    scale_learning_rate(cfg)
    if cfg.SEED < 0:
        cfg.SEED = comm.shared_random_seed() % 2**31
        _LOGGER.info("SEED is drawn: %d.", cfg.SEED)
    cfg.freeze()
    return cfg
