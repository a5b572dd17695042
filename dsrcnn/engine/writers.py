"""Writers of scalars: console, ``metrics.json``, TensorBoard, and experiment trackers."""

import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import default_writers
from detectron2.utils.events import EventWriter, get_event_storage

from ..errors import ConfigError

_LOGGER = logging.getLogger(__name__)


def build_writers(cfg: CfgNode, max_iter: int) -> list[EventWriter]:
    """Build Detectron2's writers, and those of ``LOG.WANDB_PROJECT`` and ``LOG.MLFLOW_EXPERIMENT``.

    Raises:
        ConfigError: if a package is needed and not installed.
    """
    console, *files = default_writers(cfg.OUTPUT_DIR, max_iter)
    writers: list[EventWriter] = [console, *map(FileWriter, files)]
    if cfg.LOG.WANDB_PROJECT:
        writers.append(WandbWriter(cfg))
    if cfg.LOG.MLFLOW_EXPERIMENT:
        writers.append(MlflowWriter(cfg))
    return writers


class FileWriter(EventWriter):
    """Writer to a file that lets a training go on while the file cannot be written."""

    def __init__(self, writer: EventWriter) -> None:
        self._writer = writer
        self._failed = False
        threading.excepthook = _quiet_about_full_disks  # TensorBoard writes in a thread

    def write(self) -> None:
        """Write the latest scalars."""
        self._try(self._writer.write)

    def close(self) -> None:
        """Close the file."""
        self._try(self._writer.close)

    def _try(self, call: Callable[[], None]) -> None:
        try:
            call()
        except OSError as error:
            if not self._failed:
                self._failed = True
                _LOGGER.warning(
                    "Scalars cannot be written to OUTPUT_DIR (%s: %s); training continues.",
                    *(type(self._writer).__name__, error.strerror or error),
                )


def _quiet_about_full_disks(args: threading.ExceptHookArgs) -> None:
    if not isinstance(args.exc_value, OSError):  # `FileWriter` meets it in its next call
        threading.__excepthook__(args)


class TrackerWriter(EventWriter):
    """Base of writers for experiment trackers: collects the scalars since the last call."""

    def __init__(self) -> None:
        self._last = -1

    def write(self) -> None:
        """Send the scalars since the last call, by iteration."""
        by_iteration: dict[int, dict[str, float]] = {}
        latest = get_event_storage().latest_with_smoothing_hint(20)
        for name, (value, iteration) in latest.items():
            if iteration > self._last:
                by_iteration.setdefault(iteration, {})[name] = float(value)
        for iteration in sorted(by_iteration):
            self.send(by_iteration[iteration], iteration)
        self._last = max([self._last, *by_iteration])

    def send(self, scalars: dict[str, float], iteration: int) -> None:
        """Send the scalars of an iteration."""
        raise NotImplementedError


class WandbWriter(TrackerWriter):
    """Writer for Weights & Biases; a resumed training continues the run of its output folder."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                f"LOG.WANDB_PROJECT is {cfg.LOG.WANDB_PROJECT!r}, but wandb is not installed. "
                "Run: pip install wandb. Or write LOG.WANDB_PROJECT ''."
            ) from error
        id_file = Path(cfg.OUTPUT_DIR) / "wandb_run"
        self._run: Any = wandb.init(
            project=cfg.LOG.WANDB_PROJECT,
            dir=cfg.OUTPUT_DIR,
            config=cfg,
            id=id_file.read_text() if id_file.is_file() else None,
            resume="allow",
        )
        id_file.write_text(self._run.id)

    def send(self, scalars: dict[str, float], iteration: int) -> None:
        """Log the scalars of an iteration."""
        self._run.log(scalars, step=iteration)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class MlflowWriter(TrackerWriter):
    """Writer for MLflow; a resumed training continues the run of its output folder.

    Runs go to ``MLFLOW_TRACKING_URI`` of the environment, by default to the folder ``mlruns``.
    """

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        name = cfg.LOG.MLFLOW_EXPERIMENT
        try:
            import mlflow
        except ImportError as error:
            raise ConfigError(
                f"LOG.MLFLOW_EXPERIMENT is {name!r}, but mlflow is not installed. Run: pip install "
                "mlflow. Or write LOG.MLFLOW_EXPERIMENT ''."
            ) from error
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # newer ones refuse folders
        uri = os.environ.get("MLFLOW_TRACKING_URI", Path("mlruns").absolute().as_uri())
        self._client: Any = mlflow.MlflowClient(tracking_uri=uri)
        id_file = Path(cfg.OUTPUT_DIR) / "mlflow_run"
        if id_file.is_file():
            self._run = id_file.read_text()
            return
        known = self._client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else self._client.create_experiment(name)
        tags = {"mlflow.runName": Path(cfg.OUTPUT_DIR).name}
        self._run = self._client.create_run(experiment, tags=tags).info.run_id
        self._client.log_text(self._run, cfg.dump(), "config.yaml")
        id_file.write_text(self._run)

    def send(self, scalars: dict[str, float], iteration: int) -> None:
        """Log the scalars of an iteration."""
        for name, value in scalars.items():
            self._client.log_metric(self._run, name, value, step=iteration)

    def close(self) -> None:
        """Finish the run."""
        self._client.set_terminated(self._run)
