"""Checkpoints: written atomically, read safely, with a report of the loaded tensors."""

import logging
import os
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import nn

from ..errors import DsrcnnError, UnreadableWeightsError, WeightsError
from .fit_weights import Fit, load_fitting, tensors_of
from .resume import newest_first
from .weight_io import read_any, require_file, write_atomically

_LOGGER = logging.getLogger(__name__)


def without_weights(cfg: CfgNode) -> CfgNode:
    """Copy a config without the weights to start from, which a trained model includes."""
    bare = cfg.clone()
    bare.defrost()
    bare.MODEL.WEIGHTS = ""
    bare.MODEL.TIMM.PRETRAINED, bare.MODEL.TIMM.WEIGHTS = False, ""
    return bare


def load_trained(model: nn.Module, cfg: CfgNode) -> dict[str, Any]:
    """Fill a model with ``MODEL.WEIGHTS``, its averaged weights with ``MODEL.EMA``.

    Returns:
        The rest of the content of the file.

    Raises:
        WeightsError: if the weights are missing or do not fill the whole model.
    """
    average, trust = cfg.MODEL.EMA.ENABLED, cfg.MODEL.TRUST_WEIGHTS
    checkpointer = Checkpointer(model, strict=True, prefer_average=average, trust=trust)
    return checkpointer.load(cfg.MODEL.WEIGHTS)


class Checkpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, with one readable report instead of several warnings.

    Attributes:
        strict: raise an error if the file lacks a tensor of the model or has it in another shape,
            since an evaluation with partly random weights is meaningless.
        prefer_average: load the averaged weights (``MODEL.EMA``) if the file has them.
        trust: run code that a pickled file may contain.
        kept: number of newest checkpoints that `save` leaves; 0 for all.
        description: what every written file contains beside weights and state.
        resumed: the file that training continues from.
    """

    resumed: str | None = None

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        save_to_disk: bool | None = None,
        strict: bool = False,
        prefer_average: bool = False,
        trust: bool = False,
        kept: int = 0,
        description: dict[str, Any] | None = None,
        **checkpointables: Any,
    ) -> None:
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.strict = strict
        self.prefer_average = prefer_average
        self.trust = trust
        self.kept = kept
        self.description = description or {}

    def save(self, name: str, **kwargs: Any) -> None:
        """Write model and checkpointables to ``<name>.pth``, the last checkpoint from now on.

        Older ones than the newest `kept` are deleted.

        Raises:
            CheckpointError: if it cannot be written; earlier checkpoints are untouched.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        content = {"model": self.model.state_dict()}
        content |= {key: part.state_dict() for key, part in self.checkpointables.items()}
        self.write(f"{name}.pth", {**content, **kwargs})
        self.tag_last_checkpoint(f"{name}.pth")
        for path in newest_first(self.save_dir)[self.kept :] if self.kept else []:
            Path(path).unlink(missing_ok=True)

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Write a file that resuming ignores into the folder of the checkpoints."""
        if self.save_dir and self.save_to_disk:
            path = os.path.join(self.save_dir, name)
            self.logger.info("Saving %s", path)
            content = {**self.description, **content}
            write_atomically(path, lambda file: torch.save(content, file))

    def describe_last(self, *, diverged: bool = False) -> str:
        """Say from which checkpoint training can go on, and how.

        Args:
            diverged: whether to continue exactly would fail again.
        """
        if not self.has_checkpoint():
            return f"There is no checkpoint in {self.save_dir} yet."
        file = self.get_checkpoint_file()
        if not diverged:
            return f"The last checkpoint is {file}; --resume continues from there."
        return (
            f"The last checkpoint is {file}. --resume keeps its learning rate: to go on with "
            f"another, write MODEL.WEIGHTS {file} and another OUTPUT_DIR."
        )

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Record the name of the last checkpoint."""
        path = os.path.join(self.save_dir, "last_checkpoint")
        write_atomically(path, lambda file: file.write(last_filename_basename.encode()))

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Load the newest checkpoint that all processes can read, or else the weights at `path`.

        Raises:
            WeightsError: if there are checkpoints, but none can be used.
        """
        files = newest_first(self.save_dir) if resume else []
        if resume and not files and self.strict:  # evaluation needs no state
            files = [str(p) for p in Path(self.save_dir).glob("model_final.pth")]
        files = comm.all_gather(files)[0]
        if not files:
            return self.load(path, checkpointables=[])
        for file in files:
            content, damage = {}, None
            try:
                content = self.load(file)
            except UnreadableWeightsError as error:
                damage = str(error)
            damages = [text for text in comm.all_gather(damage) if text]
            if not damages:
                self.resumed = file
                return content
            _LOGGER.warning("%s Trying the checkpoint before it.", damages[0])
        raise WeightsError(
            f"No checkpoint in {self.save_dir} can be read. Leave out --resume to start again."
        )

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Load the weights of a file, and the state of these `checkpointables`; None for all.

        Returns:
            The rest of the content.

        Raises:
            UnreadableWeightsError: if the file is damaged.
            WeightsError: if it is missing, or does not fit although `strict` is set or training
                continues from it.
        """
        if not path:
            if self.strict:
                raise WeightsError(
                    "MODEL.WEIGHTS is empty, so the model would be evaluated with random weights. "
                    "Write MODEL.WEIGHTS <checkpoint>; 'dsrcnn eval RUN' takes the best of a run."
                )
            return {}
        names = list(self.checkpointables) if checkpointables is None else checkpointables
        path = self._local_path(path)
        content = self._load_file(path)
        fit = self._load_model(content, path)
        if names and (fit.unused or not fit.is_complete):
            raise WeightsError(
                f"Training cannot continue from {path}: the model has changed. {fit.report(' ')} "
                "Use the config of the run, or leave out --resume, and write MODEL.WEIGHTS to "
                "start another run from these weights."
            )
        self._report(fit, path)
        for name in names:
            if name not in content and name == "ema":  # may be switched on later
                continue
            if name not in content:
                raise WeightsError(
                    f"Training cannot continue from {path}, which has weights but not the state of "
                    f"{name}. Leave out --resume, and write MODEL.WEIGHTS to start another run "
                    "from its weights."
                )
            try:
                self.checkpointables[name].load_state_dict(content.pop(name))
            except DsrcnnError:
                raise
            except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
                raise WeightsError(
                    f"Training cannot continue from {path}: its state of {name} does not fit "
                    f"({error}). Use the config of the run, or leave out --resume."
                ) from error
        return content

    def _local_path(self, path: str) -> str:
        """Return a file that exists on all machines; downloads what has an address."""
        if "://" in path:
            try:
                return str(self.path_manager.get_local_path(path))
            except (OSError, ValueError, AssertionError, RuntimeError) as error:
                raise WeightsError(
                    f"Weights {path!r} cannot be fetched ({error}). Write a local file to "
                    "MODEL.WEIGHTS, or '' to train from random weights."
                ) from error
        exists = comm.all_gather(os.path.isfile(path))
        if any(exists) and not all(exists):
            raise WeightsError(
                f"Weights {path!r} exist on some machines only. OUTPUT_DIR and MODEL.WEIGHTS "
                "must be paths that all machines can read."
            )
        require_file(path)
        return path

    def _load_file(self, filename: str) -> dict[str, Any]:
        """Read a file in the formats of this package, Detectron2, Caffe2 and pycls."""
        content = read_any(filename, trust=self.trust)
        if not isinstance(content, dict):
            return {"model": content}  # refused by `tensors_of`
        if filename.endswith(".pyth") and "model_state" in content:
            weights = content["model_state"]
            return {"model": weights, "__author__": "pycls", "matching_heuristics": True}
        if filename.endswith(".pkl") and not ("model" in content and "__author__" in content):
            blobs = content.get("blobs", content)
            if isinstance(blobs, dict):
                blobs = {k: v for k, v in blobs.items() if not str(k).endswith("_momentum")}
            return {"model": blobs, "__author__": "Caffe2", "matching_heuristics": True}
        if "model" not in content:
            return {"model": content}
        average = content.get("ema")
        if self.prefer_average and isinstance(average, dict) and "model" in average:
            _LOGGER.info("Loading the averaged weights of the file (MODEL.EMA).")
            content["model"] = average["model"]
        return content

    def _load_model(self, checkpoint: dict[str, Any], path: str = "") -> Fit:
        """Load what fits of the weights in `checkpoint`, which are taken out."""
        state: dict[str, Any] = tensors_of(checkpoint.pop("model"), path)
        if checkpoint.get("matching_heuristics", False):
            is_caffe2 = checkpoint.get("__author__") == "Caffe2"
            own = self.model.state_dict()
            state = align_and_update_state_dicts(own, state, c2_conversion=is_caffe2)
        return load_fitting(self.model, state, path, resize=not self.strict)

    def _report(self, fit: Fit, path: str) -> None:
        """Say what was loaded.

        Raises:
            WeightsError: if nothing was, or if `strict` is set and something is missing.
        """
        if self.strict and not fit.is_complete:
            raise WeightsError(
                f"The weights do not fit the model to evaluate. {fit.report(' ')} "
                "Use the config the weights were trained with."
            )
        if not fit.fitting:
            raise WeightsError(
                f"No tensor of {path!r} belongs to the model. {fit.report(' ')} Write weights "
                "of this architecture or of its backbone to MODEL.WEIGHTS, or '' for random ones."
            )
        _LOGGER.log(logging.INFO if fit.is_complete else logging.WARNING, fit.report())
