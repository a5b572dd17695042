"""Rules about output folders that hold a run already: to continue it, or to begin another."""

import functools
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode
from detectron2.utils import comm

from ..data.datasets.custom import class_names
from ..errors import ConfigError, DsrcnnError, WeightsError
from .weight_io import read_weights
from .writers import TRACKED_RUNS

_LOGGER = logging.getLogger(__name__)
# With the state of the training. Files of other names, such as copies, are the user's.
_CHECKPOINT = re.compile(r"model_(\d{7,})\.pth")
_MODELS = ("model_final.pth", "model_best.pth")
_RECORDS = ("last_checkpoint", "events.out.tfevents.*", *TRACKED_RUNS)
# Keys whose change another state of model or optimizer would need. Others that change tensors are
# found when the checkpoint is loaded.
_FIXED = (
    *("MODEL.META_ARCHITECTURE", "MODEL.BACKBONE.NAME", "MODEL.BACKBONE.FREEZE_AT", "MODEL.FREEZE"),
    *("MODEL.SparseRCNN.NUM_CLASSES", "MODEL.ROI_HEADS.NUM_CLASSES", "SOLVER.OPTIMIZER"),
    *("SOLVER.NO_DECAY", "SOLVER.LAYER_DECAY"),
)
# Keys whose values are in the checkpoint.
_KEPT = (
    *("SOLVER.BASE_LR", "SOLVER.WEIGHT_DECAY", "SOLVER.WEIGHT_DECAY_BIAS", "SOLVER.MOMENTUM"),
    *("SOLVER.BIAS_LR_FACTOR", "SOLVER.BACKBONE_MULTIPLIER", "SOLVER.NECK_MULTIPLIER"),
    *("SOLVER.NESTEROV", "SEED"),
)
_SILENT = ("OUTPUT_DIR", "VERSION", "MODEL.DEVICE", "MODEL.WEIGHTS")


def check_folder(folder: str | Path, *, resume: bool, overwrite: bool) -> None:
    """Check that a run may write to `folder`; all processes call it.

    Raises:
        ConfigError: if there is another run, and it is neither continued nor overwritten.
    """
    message = comm.all_gather(_objection(Path(folder), resume, overwrite))[0]
    if message is not None:
        raise ConfigError(message)


def _objection(folder: Path, resume: bool, overwrite: bool) -> str | None:
    if resume and overwrite:
        return "--resume continues a run and --overwrite deletes it; write one of them."
    files = [path.name for path in _weights_in(folder)]
    names = ", ".join(files[:3]) + (", ..." if files[3:] else "")
    # A run that was killed before its first checkpoint may have evaluated: it begins again.
    if resume and set(files) - {"model_best.pth"} and not newest_first(folder):
        return (
            f"OUTPUT_DIR {str(folder)!r} has {names}, but no model_<iteration>.pth from which "
            "training can continue. Leave out --resume, and write MODEL.WEIGHTS to start another "
            "run in another OUTPUT_DIR from these weights."
        )
    if files and not resume and not overwrite:
        return (
            f"OUTPUT_DIR {str(folder)!r} holds another run ({names}). Write --resume to continue "
            "it, another OUTPUT_DIR, or --overwrite to delete its weights and metrics."
        )
    return None


def clear_folder(folder: str | Path) -> None:
    """Delete weights, metrics and events of an earlier run; other files stay.

    Raises:
        ConfigError: if a file cannot be deleted.
    """
    path = Path(folder) / "metrics.json"
    try:
        if path.is_file():
            os.truncate(path, 0)  # a writer may have opened it already
        records = [path for pattern in _RECORDS for path in Path(folder).glob(pattern)]
        for path in (*_weights_in(Path(folder)), *records):
            path.unlink()
    except OSError as error:
        raise ConfigError(
            f"{path} of an earlier run cannot be deleted ({error.strerror}). Write another "
            "OUTPUT_DIR."
        ) from error


def checkpoints_in(folder: str | Path) -> dict[int, Path]:
    """Return the files ``model_<iteration>.pth`` in `folder` by iteration, ascending."""
    found = ((iteration_of(path), path) for path in Path(folder).glob("model_*.pth"))
    return dict(sorted((number, path) for number, path in found if number is not None))


def iteration_of(path: Path) -> int | None:
    """Return the iteration in the name of a checkpoint, None for other files."""
    match = _CHECKPOINT.fullmatch(path.name)
    return None if match is None else int(match[1])


def _weights_in(folder: Path) -> list[Path]:
    models = [folder / name for name in _MODELS]
    return [*checkpoints_in(folder).values(), *(path for path in models if path.exists())]


def newest_first(folder: str | Path) -> list[str]:
    """List the checkpoints in `folder` from which training can continue."""
    files = [path for path in checkpoints_in(folder).values() if os.path.isfile(path)]
    paths = sorted(files, key=lambda path: path.stat().st_mtime, reverse=True)
    last = Path(folder) / "last_checkpoint"
    text = last.read_bytes() if os.path.isfile(last) else b""  # not of a pipe
    # Other programs tag other files; those without state are of no use here.
    paths.sort(key=lambda path: path.name.encode() != text.strip())
    return [str(path) for path in paths]


def check_resume(cfg: CfgNode) -> None:
    """Compare the config with that of the run in ``OUTPUT_DIR`` before anything is built.

    Changes that the run can continue with are logged in one line. Values that the checkpoint keeps
    are set in `cfg`, so that records of the run name what it trains with.

    Raises:
        ConfigError: if the checkpoint does not fit the config.
    """
    saved, classes = _saved_config(cfg)
    if saved is None:
        return
    renamed = _check_classes(classes, class_names(cfg.DATASETS.TRAIN[0]) or [], cfg.OUTPUT_DIR)
    before, now = (dict(_flatten(x)) for x in (saved, yaml.safe_load(cfg.dump())))
    changed = {
        key: (before[key], now[key])
        for key in now
        if key in before and before[key] != now[key] and key not in _SILENT
    }
    fixed = [key for key in changed if key in _FIXED]
    if fixed:
        texts = "; ".join(f"{k} is {changed[k][1]!r}, was {changed[k][0]!r}" for k in fixed)
        raise ConfigError(
            f"The run in {cfg.OUTPUT_DIR!r} cannot continue with another model, optimizer or set "
            f"of trained parameters: {texts}. Use the config of the run, or leave out --resume and "
            "write another OUTPUT_DIR; MODEL.WEIGHTS starts from its weights."
        )
    changes = [*renamed, *(_describe_change(k, *values) for k, values in changed.items())]
    if changes:
        _LOGGER.warning(
            "The run continues with other settings than it had: %s.", "; ".join(changes)
        )
    is_frozen = cfg.is_frozen()
    cfg.defrost()
    for key in changed.keys() & set(_KEPT):
        *path, name = key.split(".")
        functools.reduce(getattr, path, cfg)[name] = changed[key][0]
    if is_frozen:
        cfg.freeze()


def _check_classes(before: Sequence[str], now: Sequence[str], folder: str) -> list[str]:
    """Compare the class names of a run with those of its training data; returns new names.

    Raises:
        ConfigError: if classes are in another order, which the model cannot notice.
    """
    numbers = {name: index for index, name in enumerate(now)}
    for number, name in enumerate(before):
        if numbers.get(name, number) != number:
            raise ConfigError(
                f"Class {name!r} is number {numbers[name]} in the training data, but number "
                f"{number} in the run in {folder!r}, so the model would mix up classes. Give the "
                "data the order of the run (its classes are in every checkpoint), or leave out "
                "--resume and write another OUTPUT_DIR; MODEL.WEIGHTS starts from its weights."
            )
    pairs = zip(before, now, strict=False)
    return [f"class {new!r} instead of {old!r}" for old, new in pairs if old != new]


def _describe_change(key: str, before: object, now: object) -> str:
    if key in _KEPT:
        return f"{key} {now!r} has no effect, the checkpoint keeps {before!r}"
    return f"{key} {now!r} instead of {before!r}"


def _saved_config(cfg: CfgNode) -> tuple[Mapping[str, Any] | None, Sequence[str]]:
    """Read config and class names of the newest checkpoint that can be read, if there are any."""
    for file in newest_first(cfg.OUTPUT_DIR):
        try:
            content = read_weights(file, trust=cfg.MODEL.TRUST_WEIGHTS, lazily=True)
        except DsrcnnError:
            continue
        content = content if isinstance(content, dict) else {}
        text, classes = content.get("config"), content.get("classes")
        try:
            saved = yaml.safe_load(text) if isinstance(text, str) else None
        except yaml.YAMLError:
            saved = None
        if isinstance(saved, Mapping):
            return saved, classes if isinstance(classes, list) else []
        _LOGGER.warning("%s has no config, so changes since then are not noticed.", file)
        return None, []
    return None, []


def _flatten(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def check_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Check that a saved state belongs to the parameters of `optimizer`.

    Torch loads moments of any shape, and fused optimizers then write beyond them.

    Raises:
        WeightsError: if groups, parameters or shapes differ, or values are unusable.
    """
    saved, own = state["param_groups"], optimizer.param_groups
    counts = [[len(group["params"]) for group in groups] for groups in (saved, own)]
    if counts[0] != counts[1]:
        raise WeightsError(
            f"The optimizer of the checkpoint has groups of {counts[0]} parameters, this one has "
            f"{counts[1]}: another set is trained, or with other learning rate factors. Use the "
            "config of the run, or leave out --resume."
        )
    indices = [index for group in saved for index in group["params"]]
    parameters = [parameter for group in own for parameter in group["params"]]
    if not all(isinstance(group.get("lr"), (int, float)) for group in saved):
        raise WeightsError(
            "The optimizer of the checkpoint has learning rates that are no numbers. Leave out "
            "--resume."
        )
    is_adam, adam = isinstance(optimizer, torch.optim.AdamW), {"exp_avg", "exp_avg_sq"}
    entries = list(state["state"].values())
    has_moments = bool(entries) and all(adam <= entry.keys() for entry in entries)
    if is_adam != has_moments:
        raise WeightsError(
            "The checkpoint has the state of another optimizer than SOLVER.OPTIMIZER. Write that "
            "of the run, or leave out --resume."
        )
    for index, parameter in zip(indices, parameters, strict=True):
        for name, value in state["state"].get(index, {}).items():
            if not isinstance(value, torch.Tensor) or value.dim() == 0:
                continue
            if not value.is_floating_point() or not bool(torch.isfinite(value).all()):
                raise WeightsError(
                    f"The optimizer's {name} of parameter {index} in the checkpoint has values "
                    "that are no finite numbers. Leave out --resume."
                )
            if value.shape != parameter.shape:
                raise WeightsError(
                    f"The optimizer's {name} of parameter {index} is {tuple(value.shape)} in the "
                    f"checkpoint, {tuple(parameter.shape)} in the model. Use the config of the "
                    "run, or leave out --resume."
                )


def best_weights(folder: Path) -> Path:
    """Return the best model of a run, or else the final or the last one.

    Raises:
        WeightsError: if there is none.
    """
    files = [folder / "model_best.pth", folder / "model_final.pth"]
    for file in [*files, *map(Path, newest_first(folder))]:
        if file.is_file():
            return file
    raise WeightsError(f"{folder} has no model_*.pth. Write MODEL.WEIGHTS <checkpoint>.")
