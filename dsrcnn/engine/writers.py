"""Writers of scalars: console, ``metrics.json``, TensorBoard, and experiment trackers."""

import logging
import os
import re
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import default_writers
from detectron2.utils.events import EventWriter, get_event_storage

from ..errors import ConfigError

_LOGGER = logging.getLogger(__name__)
_WANDB_RUN, _MLFLOW_RUN = TRACKED_RUNS = ("wandb_run", "mlflow_run")  # files with ids of runs


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
    """Base of writers for experiment trackers: collects the scalars since the last call.

    A tracker that cannot be reached lets training go on: the scalars are in ``metrics.json``, too.

    Attributes:
        id_file: file in the output folder with the run of the tracker, for a resumed training.
    """

    def __init__(self, key: str, id_file: Path) -> None:
        """Prepare the writer.

        Args:
            key: config key of the tracker, for messages.
            id_file: see above.
        """
        self.id_file = id_file
        self._key = key
        self._last = -1
        self._is_open, self._failed = False, False

    def begin(self, *, resumed: bool) -> None:
        """Continue the run in the tracker if the training is `resumed`, or else begin another.

        Raises:
            ConfigError: if the tracker gives an error.
        """
        known = resumed and self.id_file.is_file()
        try:
            self.id_file.write_text(self.open(self.id_file.read_text() if known else None))
        except Exception as error:  # there is no end to what services raise
            raise ConfigError(
                f"{self._key} is set, but its tracker cannot begin a run: {error}. Correct its "
                f"settings, or write {self._key} ''."
            ) from error
        self._is_open = True

    def write(self) -> None:
        """Send the scalars since the last call, by iteration."""
        if not self._is_open:  # training could not begin
            return
        by_iteration: dict[int, dict[str, float]] = {}
        latest = get_event_storage().latest_with_smoothing_hint(20)
        for name, (value, iteration) in latest.items():
            if iteration > self._last:
                by_iteration.setdefault(iteration, {})[name] = float(value)
        for iteration in sorted(by_iteration):
            self._try(partial(self.send, by_iteration[iteration], iteration))
        self._last = max([self._last, *by_iteration])

    def close(self) -> None:
        """Finish the run."""
        if self._is_open:
            self._try(self.finish)

    def _try(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            if not self._failed:
                self._failed = True
                _LOGGER.warning(
                    "Scalars cannot be sent to the tracker of %s (%s); training continues.",
                    *(self._key, error),
                )

    def open(self, run: str | None) -> str:
        """Continue a run by its id, or begin one if it is None; return its id."""
        raise NotImplementedError

    def send(self, scalars: dict[str, float], iteration: int) -> None:
        """Send the scalars of an iteration."""
        raise NotImplementedError

    def finish(self) -> None:
        """Finish the run."""
        raise NotImplementedError


class WandbWriter(TrackerWriter):
    """Writer for Weights & Biases; a resumed training continues the run of its output folder."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__("LOG.WANDB_PROJECT", Path(cfg.OUTPUT_DIR) / _WANDB_RUN)
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                f"LOG.WANDB_PROJECT is {cfg.LOG.WANDB_PROJECT!r}, but wandb is not installed. "
                "Run: pip install wandb. Or write LOG.WANDB_PROJECT ''."
            ) from error
        self._init, self._cfg = wandb.init, cfg
        self._run: Any = None

    def open(self, run: str | None) -> str:
        """Continue a run by its id, or begin one if it is None; return its id."""
        cfg = self._cfg
        folder, project = cfg.OUTPUT_DIR, cfg.LOG.WANDB_PROJECT
        self._run = self._init(project=project, dir=folder, config=cfg, id=run, resume="allow")
        return str(self._run.id)

    def send(self, scalars: dict[str, float], iteration: int) -> None:
        """Log the scalars of an iteration."""
        self._run.log(scalars, step=iteration)

    def finish(self) -> None:
        """Finish the run."""
        self._run.finish()


class MlflowWriter(TrackerWriter):
    """Writer for MLflow; a resumed training continues the run of its output folder.

    Runs go to ``MLFLOW_TRACKING_URI`` of the environment, by default to the folder ``mlruns``.
    """

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__("LOG.MLFLOW_EXPERIMENT", Path(cfg.OUTPUT_DIR) / _MLFLOW_RUN)
        self._cfg, self._run = cfg, ""
        try:
            import mlflow
        except ImportError as error:
            raise ConfigError(
                f"LOG.MLFLOW_EXPERIMENT is {cfg.LOG.MLFLOW_EXPERIMENT!r}, but mlflow is not "
                "installed. Run: pip install mlflow. Or write LOG.MLFLOW_EXPERIMENT ''."
            ) from error
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # newer ones refuse folders
        uri = os.environ.get("MLFLOW_TRACKING_URI", Path("mlruns").absolute().as_uri())
        self._client: Any = mlflow.MlflowClient(tracking_uri=uri)

    def open(self, run: str | None) -> str:
        """Continue a run by its id, or begin one if it is None; return its id."""
        self._run = run or self._create()
        return self._run

    def _create(self) -> str:
        cfg, client = self._cfg, self._client
        name = cfg.LOG.MLFLOW_EXPERIMENT
        known = client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else client.create_experiment(name)
        tags = {"mlflow.runName": Path(cfg.OUTPUT_DIR).name}
        run: str = client.create_run(experiment, tags=tags).info.run_id
        client.log_text(run, cfg.dump(), "config.yaml")
        return run

    def send(self, scalars: dict[str, float], iteration: int) -> None:
        """Log the scalars of an iteration, under names that MLflow takes."""
        for name, value in scalars.items():
            self._client.log_metric(self._run, mlflow_name(name), value, step=iteration)

    def finish(self) -> None:
        """Finish the run."""
        self._client.set_terminated(self._run)


def mlflow_name(name: str) -> str:
    """Replace characters that names in MLflow must not have by their codes, ``+`` by ``_2b_``.

    Names of scalars contain those of classes, which may have any.
    """
    return re.sub(r"[^\w\-. /]", lambda match: f"_{ord(match[0]):x}_", name)
