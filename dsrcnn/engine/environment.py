"""What a run depends on besides its config: recorded, and made deterministic on request."""

import json
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm

from ..version import __version__

__all__ = ["make_deterministic", "record_environment"]

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
