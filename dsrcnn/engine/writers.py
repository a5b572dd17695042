"""Where numbers of a training go: log, ``metrics.json``, TensorBoard, and by choice more."""

import csv
import os
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import default_writers
from detectron2.utils.events import EventWriter, get_event_storage

from ..errors import ConfigError

__all__ = ["CsvWriter", "WandbWriter", "build_writers"]


def build_writers(cfg: CfgNode, max_iter: int) -> list[EventWriter]:
    """Detectron2's writers, and those that ``LOG`` asks for.

    Raises:
        ConfigError: if Weights & Biases is asked for and not installed.
    """
    writers: list[EventWriter] = default_writers(cfg.OUTPUT_DIR, max_iter)
    if cfg.LOG.CSV:
        writers.append(CsvWriter(os.path.join(cfg.OUTPUT_DIR, "metrics.csv")))
    if cfg.LOG.WANDB_PROJECT:
        writers.append(WandbWriter(cfg))
    return writers


def _new_entries(after: int) -> list[tuple[int, str, float]]:
    """Iteration, name and value of all scalars later than iteration `after`."""
    latest = get_event_storage().latest_with_smoothing_hint(20)
    entries = [(iteration, name, float(value)) for name, (value, iteration) in latest.items()]
    return sorted(e for e in entries if e[0] > after)


class CsvWriter(EventWriter):
    """One line per number: iteration, name, value. Tables of any shape can be made of it."""

    def __init__(self, path: str | Path) -> None:
        """Append to a file, or begin it."""
        is_new = not Path(path).is_file()
        self._file = open(path, "a", newline="")  # noqa: SIM115  (open as long as the training)
        self._writer = csv.writer(self._file)
        if is_new:
            self._writer.writerow(["iteration", "name", "value"])
        self._last = -1

    def write(self) -> None:
        """Write what is new."""
        entries = _new_entries(self._last)
        self._writer.writerows(entries)
        self._file.flush()
        self._last = max([self._last, *(e[0] for e in entries)])

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class WandbWriter(EventWriter):
    """Weights & Biases; a resumed training goes on in the same run."""

    def __init__(self, cfg: CfgNode) -> None:
        """Start or continue the run of an output folder."""
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                f"LOG.WANDB_PROJECT is {cfg.LOG.WANDB_PROJECT!r}, but wandb is not installed. "
                "Run: pip install wandb. Or write LOG.WANDB_PROJECT ''."
            ) from error
        known = Path(cfg.OUTPUT_DIR) / "wandb_run"
        self._run: Any = wandb.init(
            project=cfg.LOG.WANDB_PROJECT,
            dir=cfg.OUTPUT_DIR,
            config=cfg,
            id=known.read_text() if known.is_file() else None,
            resume="allow",
        )
        known.write_text(self._run.id)
        self._last = -1

    def write(self) -> None:
        """Send what is new, iteration by iteration."""
        by_iteration: dict[int, dict[str, float]] = {}
        for iteration, name, value in _new_entries(self._last):
            by_iteration.setdefault(iteration, {})[name] = value
        for iteration, values in by_iteration.items():
            self._run.log(values, step=iteration)
        self._last = max([self._last, *by_iteration])

    def close(self) -> None:
        """End the run."""
        self._run.finish()
