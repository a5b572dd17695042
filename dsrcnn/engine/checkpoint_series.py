"""Evaluation of the checkpoints of a run, one after the other."""

import csv
import logging
from collections.abc import Sequence
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from tabulate import tabulate

from ..errors import ConfigError, WeightsError
from .checkpoint import Checkpointer
from .resume import checkpoints_in, iteration_of
from .trainer import Trainer

_LOGGER = logging.getLogger(__name__)
_SHOWN = ("AP", "AP50", "AP75", "mMR", "Recall")
_FINAL = "model_final.pth"


def find_checkpoints(folder: str | Path, iterations: Sequence[int] | None = None) -> list[Path]:
    """Return the checkpoints of a run, ascending by iteration.

    Args:
        folder: ``OUTPUT_DIR`` of the run.
        iterations: those of the files ``model_<iteration>.pth``; None for all, and
            ``model_final.pth`` if the folder has no other.

    Raises:
        ConfigError: if there is no checkpoint of an iteration.
        WeightsError: if there is none at all.
    """
    found = checkpoints_in(folder)
    final = Path(folder) / _FINAL
    if not found and iterations is None and final.is_file():
        return [final]
    if not found:
        raise WeightsError(
            f"{folder} has no model_<iteration>.pth. Write the output folder of a training run; "
            "SOLVER.CHECKPOINTS_KEPT 0 keeps all of its checkpoints."
        )
    for iteration in iterations or ():
        if iteration not in found:
            raise ConfigError(
                f"--checkpoints names iteration {iteration}, but {folder} has "
                f"{', '.join(map(str, sorted(found)))}; write some of these, or all."
            )
    return [found[i] for i in sorted(set(found if iterations is None else iterations))]


def evaluate_checkpoints(
    cfg: CfgNode, files: Sequence[Path], output: str | Path
) -> list[dict[str, float]]:
    """Evaluate each file on ``DATASETS.TEST``, and write a row of the CSV file after each.

    With ``MODEL.EMA.ENABLED`` the averaged weights are evaluated, as after a training run, and with
    ``TEST.AUG.ENABLED`` also with test-time augmentation.

    Args:
        cfg: of the model and its data.
        files: of `find_checkpoints`.
        output: CSV file with one row a checkpoint; an old one is replaced.

    Returns:
        On the main process, the metrics of each file by name, such as ``bbox/AP``, and
        ``iteration``.

    Raises:
        WeightsError: if a file does not fill the whole model.
    """
    model = Trainer.build_model(cfg)
    options = {"prefer_average": cfg.MODEL.EMA.ENABLED, "trust": cfg.MODEL.TRUST_WEIGHTS}
    checkpointer = Checkpointer(model, cfg.OUTPUT_DIR, strict=True, **options)
    rows: list[dict[str, float]] = []
    for number, file in enumerate(files, start=1):
        _LOGGER.info("Checkpoint %d of %d: %s", number, len(files), file)
        content = checkpointer.load(str(file), checkpointables=[])
        by_task = Trainer.test(cfg, model)
        if cfg.TEST.AUG.ENABLED:
            by_task.update(Trainer.test_with_TTA(cfg, model))
        results = flatten_results_dict(by_task)
        if comm.is_main_process():
            in_name = iteration_of(file)
            iteration = int(content.get("iteration", -1)) if in_name is None else in_name
            rows.append({"iteration": iteration, **results})
            _write(rows, Path(output))
    if rows:
        _LOGGER.info("%s\n\n%s", _table(rows), output)
    return rows


def _write(rows: list[dict[str, float]], path: Path) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def _table(rows: list[dict[str, float]]) -> str:
    names = [n for n in rows[0] if n == "iteration" or n.rsplit("/", 1)[-1] in _SHOWN]
    cells = [[row.get(name, "") for name in names] for row in rows]
    return tabulate(cells, headers=names, floatfmt=("d", *[".2f"] * (len(names) - 1)))
