"""Set-up of a run: output folder, log, records of the environment, seed, final solver settings."""

import functools
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
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultTrainer
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng

from ..config import load_cfg, read_cfg
from ..config.files import check_yaml
from ..data.buckets import choose_buckets
from ..data.build import load_records, training_records
from ..data.datasets.custom import check_registered
from ..data.datasets.validate import is_learnable
from ..errors import ConfigError, DataError
from ..evaluation import build_evaluator
from ..solver import scale_learning_rate, use_epochs
from ..utils.files import prepare_folder
from ..version import __version__
from .console import configure_logging
from .resume import check_folder, check_resume

_LOGGER = logging.getLogger(__name__)
_PACKAGES = ("torch", "torchvision", "numpy", "scipy", "Pillow", "pycocotools", "faster-coco-eval")
# Opened by their names, where a named pipe would block; checkpoints replace what is there.
_FILES = ("config.yaml", "environment.txt", "environment.jsonl", "log.txt", "metrics.json")


def setup_run(
    config_file: str,
    opts: list[str],
    *,
    resume: bool = False,
    eval_only: bool = False,
    overwrite: bool = False,
) -> CfgNode:
    """Prepare training or evaluation, in every process.

    The output folder gets ``log.txt`` and a record of the environment. Evaluation writes a
    ``config.yaml`` if there is none; training calls `write_config` later, when nothing of another
    run can be lost any more. A resumed run keeps a seed that was drawn.

    Returns:
        The config from `load_cfg` with final solver settings, frozen.

    Raises:
        ConfigError: if the config cannot work, or nothing can be written to ``OUTPUT_DIR``.
        DataError: if the dataset cannot be read.
    """
    cfg = read_cfg(config_file, opts)
    prepare_folder(cfg.OUTPUT_DIR, "OUTPUT_DIR", files=_FILES, folders=("inference",))
    configure_logging(cfg.OUTPUT_DIR, verbose=cfg.LOG.LEVEL == "verbose")
    cfg = load_cfg(config_file, opts)
    check_datasets(cfg, eval_only=eval_only)
    if not eval_only:
        check_folder(cfg.OUTPUT_DIR, resume=resume, overwrite=overwrite)
        if cfg.INPUT.NUM_BUCKETS:  # the config may be that of a run on other data
            cfg.INPUT.BUCKETS = []
        if resume:
            restore_drawn(cfg)
        cfg = resolve_solver(cfg)
        if cfg.SOLVER.WARMUP_ITERS >= cfg.SOLVER.MAX_ITER:
            _LOGGER.warning(
                "SOLVER.WARMUP_ITERS is %d of SOLVER.MAX_ITER %d: the learning rate never reaches "
                "BASE_LR. Lower the one or raise the other.",
                *(cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.MAX_ITER),
            )
        if resume:
            check_resume(cfg)
    check_yaml(cfg.dump(), "The config")  # of which everything after training needs to be read
    cfg.freeze()
    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED + comm.get_rank())
    if not eval_only:  # evaluation has too many sizes
        torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
    set_numerics(cfg)
    if comm.is_main_process():
        _record(cfg)
        if eval_only and not (Path(cfg.OUTPUT_DIR) / "config.yaml").is_file():
            write_config(cfg)
    return cfg


def set_numerics(cfg: CfgNode) -> None:
    """Set what `FLOAT32_PRECISION` and `DETERMINISTIC` say, in the whole process."""
    if cfg.FLOAT32_PRECISION:
        torch.set_float32_matmul_precision(cfg.FLOAT32_PRECISION)
    if cfg.DETERMINISTIC:  # for GPUs; CPU results are the same for the same number of threads
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True, warn_only=True)


def write_config(cfg: CfgNode) -> None:
    """Write ``config.yaml`` to the output folder."""
    (Path(cfg.OUTPUT_DIR) / "config.yaml").write_text(cfg.dump())


def check_datasets(cfg: CfgNode, *, eval_only: bool) -> None:
    """Check that there are data to use, and test data before the training that precedes them.

    Raises:
        ConfigError: if training should end early by test data that are absent or have no labels.
        DataError: if a dataset is not registered or not on this machine, or a test set of a
            training cannot be evaluated.
    """
    part, example = ("TEST", "shapes_val") if eval_only else ("TRAIN", "shapes_train")
    if not cfg.DATASETS[part]:
        raise DataError(
            f"DATASETS.{part} is empty. Write a registered name, such as {example}, or set "
            "DATASETS.CUSTOM.FOLDER."
        )
    for name in cfg.DATASETS.TEST if eval_only else (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        check_registered(name)
        file = MetadataCatalog.get(name).get("json_file")
        if file and "://" not in file and not os.path.isfile(file):
            raise DataError(
                f"Dataset {name} is not on this machine: {file} does not exist. Put it where "
                "datasets/README.md says, or set DETECTRON2_DATASETS to its parent folder."
            )
    if eval_only:  # which reads them at once
        return
    patience = cfg.TEST.BEST.PATIENCE
    if patience and not cfg.DATASETS.TEST:
        raise ConfigError(
            f"TEST.BEST.PATIENCE is {patience}, but DATASETS.TEST is empty, so no evaluation can "
            "end training early. Write TEST.BEST.PATIENCE 0, or name a test set."
        )
    for name in cfg.DATASETS.TEST:
        records = load_records(name, for_training=False)
        build_evaluator(cfg, name)
        is_labeled = any(is_learnable(a) for r in records for a in r["annotations"])
        if not is_labeled and name == _deciding_set(cfg):
            raise ConfigError(
                f"TEST.BEST.PATIENCE is {patience}, but test set {name} has no "
                "labels, so no evaluation can end training early. Write TEST.BEST.PATIENCE 0, or "
                "use a test set with labels."
            )


def _deciding_set(cfg: CfgNode) -> str | None:
    """Return the test set whose metric may end training early; None without."""
    best, sets = cfg.TEST.BEST, cfg.DATASETS.TEST
    named = [name for name in sets if best.METRIC.startswith(f"{name}/")]
    return next(iter((*named, *sets)), None) if best.PATIENCE else None


def describe_environment() -> str:
    """Versions and devices, as Detectron2 lists them."""
    # Torch notes on stderr that there is no GPU; the list says so, too.
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        text: str = collect_env_info()
    finally:
        logger.setLevel(level)
    return text


def _record(cfg: CfgNode) -> None:
    """Write ``environment.txt`` and a line of ``environment.jsonl``."""
    folder = Path(cfg.OUTPUT_DIR)
    folder.mkdir(parents=True, exist_ok=True)
    _LOGGER.debug("Command: %s\nConfig:\n%s", sys.argv, cfg.dump())
    environment = describe_environment()
    _LOGGER.debug("Environment:\n%s", environment)
    (folder / "environment.txt").write_text(environment + "\n", encoding="utf-8")
    entry = {  # for every start, since a run may be resumed elsewhere
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": sys.argv,
        "seed": cfg.SEED,
        "processes": comm.get_world_size(),
        "device": device_name(cfg),
        "python": platform.python_version(),
        "dsrcnn": __version__,
        "packages": {name: package_version(name) for name in _PACKAGES},
        **_git_state(),
    }
    with (folder / "environment.jsonl").open("a") as file:
        file.write(json.dumps(entry) + "\n")


def device_name(cfg: CfgNode) -> str:
    """Return the name of the GPU, or architecture and threads of the CPU."""
    if cfg.MODEL.DEVICE.startswith("cuda"):
        return torch.cuda.get_device_name(cfg.MODEL.DEVICE)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def package_version(package: str) -> str | None:
    """Return the version of an installed package, None without it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_state() -> dict[str, object]:
    """Return the commit of the package and whether files are modified; empty outside a clone."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # installed somewhere inside of another project's clone
        return {}

    def git(*words: str) -> str | None:
        try:
            result = subprocess.run(
                ["git", *words], cwd=root, capture_output=True, text=True, check=True, timeout=10
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return result.stdout.strip()

    commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain")
    return {} if commit is None else {"commit": commit, "changed": bool(changes)}


def restore_drawn(cfg: CfgNode) -> None:
    """Restore what a resumed run drew or chose at its start, in place: ``SEED`` and buckets."""
    saved, checkpoint = (Path(cfg.OUTPUT_DIR) / n for n in ("config.yaml", "last_checkpoint"))
    is_drawn = cfg.SEED < 0 or cfg.INPUT.NUM_BUCKETS
    if not (is_drawn and checkpoint.is_file() and saved.is_file()):
        return
    earlier = read_cfg(saved)
    if cfg.SEED < 0:
        cfg.SEED = earlier.SEED
    if cfg.INPUT.NUM_BUCKETS:
        cfg.INPUT.BUCKETS = earlier.INPUT.BUCKETS


def resolve_solver(cfg: CfgNode) -> CfgNode:
    """Return a frozen config with final values in ``SOLVER``, ``SEED`` and ``INPUT.BUCKETS``.

    In this order: ``REFERENCE_WORLD_SIZE`` (Detectron2's rule of constant images per process),
    ``EPOCHS``, ``REFERENCE_BATCH``, a drawn seed if ``SEED`` is negative, and buckets. A second
    call has no effect.

    Raises:
        ConfigError: if the values cannot work.
        DataError: if the data are needed, to count epochs or choose buckets, and cannot be read.
    """
    batch = cfg.SOLVER.IMS_PER_BATCH
    cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size()).clone()
    cfg.defrost()
    # BASE_LR was scaled with the batch, so it is meant for more images now.
    solver = cfg.SOLVER
    solver.REFERENCE_BATCH = round(solver.REFERENCE_BATCH * solver.IMS_PER_BATCH / batch)
    records = functools.cache(lambda: training_records(cfg))  # large sets take a while
    if cfg.SOLVER.EPOCHS.MAX:
        use_epochs(cfg, len(records()))
    scale_learning_rate(cfg)
    if cfg.SEED < 0:
        cfg.SEED = comm.shared_random_seed() % 2**31
        _LOGGER.info("SEED is drawn: %d.", cfg.SEED)
    if cfg.INPUT.NUM_BUCKETS and not cfg.INPUT.BUCKETS:
        cfg.INPUT.BUCKETS = choose_buckets(cfg, records())
    cfg.freeze()
    return cfg
