"""Checkpoints: written atomically, read safely, with a report of the loaded tensors."""

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm
from torch import nn

from ..errors import UnreadableWeightsError, WeightsError
from ..utils.training import TrainingState
from .weight_io import read_pickle, read_weights, write_atomically

_LOGGER = logging.getLogger(__name__)
_MAX_EXAMPLES = 6


class Checkpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, with one readable report instead of several warnings.

    Attributes:
        strict: raise an error if the file lacks a tensor of the model or has it in another shape,
            since an evaluation with partly random weights is meaningless.
        prefer_average: load the averaged weights (``MODEL.EMA``) if the file has them.
        trust: run code that a pickled file may contain.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        save_to_disk: bool | None = None,
        strict: bool = False,
        prefer_average: bool = False,
        trust: bool = False,
        **checkpointables: Any,
    ) -> None:
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.strict = strict
        self.prefer_average = prefer_average
        self.trust = trust

    def save(self, name: str, **kwargs: Any) -> None:
        """Write model and checkpointables to ``<name>.pth``, the last checkpoint from now on.

        Raises:
            CheckpointError: if it cannot be written; earlier checkpoints are untouched.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        content = {"model": self.model.state_dict()}
        content |= {key: part.state_dict() for key, part in self.checkpointables.items()}
        self.write(f"{name}.pth", {**content, **kwargs})
        self.tag_last_checkpoint(f"{name}.pth")

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Write a file that resuming ignores into the folder of the checkpoints."""
        if self.save_dir and self.save_to_disk:
            path = os.path.join(self.save_dir, name)
            self.logger.info("Saving %s", path)
            write_atomically(path, lambda file: torch.save(content, file))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Record the name of the last checkpoint."""
        path = os.path.join(self.save_dir, "last_checkpoint")
        write_atomically(path, lambda file: file.write(last_filename_basename.encode()))

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Load the newest checkpoint that all processes can read, or else the weights at `path`.

        Raises:
            WeightsError: if there are checkpoints, but none can be used.
        """
        files = comm.all_gather(list(self._newest_first()) if resume else [])[0]
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
                return content
            _LOGGER.warning("%s Trying the checkpoint before it.", damages[0])
        raise WeightsError(
            f"No checkpoint in {self.save_dir} can be read. Leave out --resume to start again."
        )

    def _newest_first(self) -> Iterator[str]:
        if not self.has_checkpoint():
            return
        last = self.get_checkpoint_file()
        if os.path.isfile(last):
            yield last
        files = [*Path(self.save_dir).glob("model_[0-9]*.pth")]
        files += Path(self.save_dir).glob("model_final.pth")
        for file in sorted(files, key=lambda f: f.stat().st_mtime, reverse=True):
            if file != Path(last):
                yield str(file)

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a file as Detectron2 does.

        Raises:
            UnreadableWeightsError: if the file is damaged.
            WeightsError: if it is missing, or does not fit and `strict` is set.
        """
        if not path and self.strict:
            raise WeightsError(
                "MODEL.WEIGHTS is empty, so the model would be evaluated with random weights. "
                "Write MODEL.WEIGHTS <checkpoint>; 'dsrcnn eval RUN' takes the best of a run."
            )
        missing = f"Weights {path!r} do not exist; correct MODEL.WEIGHTS."
        if path and "://" not in path:
            exists = comm.all_gather(os.path.isfile(path))
            if any(exists) and not all(exists):
                raise WeightsError(
                    f"Weights {path!r} exist on some machines only. OUTPUT_DIR and MODEL.WEIGHTS "
                    "must be paths that all machines can read."
                )
            if not all(exists):
                raise WeightsError(missing)
        try:
            return super().load(path, *args, **kwargs)
        except WeightsError:
            raise
        except FileNotFoundError as error:
            raise WeightsError(missing) from error
        except (RuntimeError, ValueError, KeyError) as error:
            raise WeightsError(
                f"Weights {path!r} do not fit this run ({error}). Write another MODEL.WEIGHTS, or "
                "leave out --resume."
            ) from error
        except OSError as error:
            raise WeightsError(
                f"Weights {path!r} cannot be fetched ({error}). Write a local file to "
                "MODEL.WEIGHTS, or '' to train from random weights."
            ) from error

    def _load_file(self, filename: str) -> dict[str, Any]:
        """Read a file in the format Detectron2 expects; called by `load`."""
        if not filename.endswith(".pkl"):
            content = read_weights(filename, trust=self.trust)
            if filename.endswith(".pyth"):  # of pycls
                weights = content["model_state"]
                return {"model": weights, "__author__": "pycls", "matching_heuristics": True}
            if "model" not in content:
                content = {"model": content}
            if self.prefer_average and "ema" in content:
                _LOGGER.info("Loading the averaged weights of the file (MODEL.EMA).")
                content["model"] = content["ema"]["model"]
            return content
        content = read_pickle(filename, trust=self.trust)
        if "model" in content and "__author__" in content:
            return content
        blobs = content.get("blobs", content)
        weights = {k: v for k, v in blobs.items() if not k.endswith("_momentum")}
        return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        """Report what was loaded in place of fvcore's warnings; called by `load`."""
        state_keys = {
            f"{name}.{key}"
            for name, module in self.model.named_modules()
            if isinstance(module, TrainingState)
            for key in module.state_dict()
        }
        shapes = [(k, tuple(a), tuple(b)) for k, a, b in incompatible.incorrect_shapes]
        reshaped = [entry for entry in shapes if entry[0] not in state_keys]
        reported = {entry[0] for entry in reshaped}
        missing = [k for k in incompatible.missing_keys if k not in reported]
        # Frozen norms do not count batches, and nothing depends on the count.
        missing = [k for k in missing if not k.endswith("num_batches_tracked")]
        total = len(self.model.state_dict())
        lines = [f"Weights: {total - len(missing) - len(reshaped)} of {total} tensors loaded."]
        if reshaped:
            texts = [f"{k} {a} in the file, {b} in the model" for k, a, b in reshaped]
            hint = _class_count_hint(reshaped)
            lines.append(f"Not loaded because of their shape: {_examples(texts)}.{hint}")
        if missing:
            lines.append(f"Not in the file: {_count_by_part(missing)}.")
        if incompatible.unexpected_keys:
            unused = _count_by_part(incompatible.unexpected_keys)
            lines.append(f"In the file but not in the model: {unused}.")
        report = "\n  ".join(lines)
        if self.strict and (missing or reshaped):
            raise WeightsError(
                f"The weights do not fit the model to evaluate.\n  {report}\n  "
                "Use the config the weights were trained with."
            )
        _LOGGER.log(logging.WARNING if missing or reshaped else logging.INFO, report)


def _examples(items: list[str]) -> str:
    more = len(items) - _MAX_EXAMPLES
    return "; ".join(items[:_MAX_EXAMPLES]) + (f"; and {more} more" if more > 0 else "")


def _count_by_part(keys: Iterable[str]) -> str:
    """Count keys by part of the model."""
    parts = Counter(".".join(key.split(".")[:2]) for key in keys)
    return _examples([f"{part} ({count})" for part, count in sorted(parts.items())])


def _class_count_hint(reshaped: list[tuple[str, tuple[int, ...], tuple[int, ...]]]) -> str:
    for key, in_file, in_model in reshaped:
        if key.endswith("class_logits.bias"):
            return (
                f" The classifier of the file has {in_file[0]} outputs, the model's {in_model[0]}: "
                "right when fine-tuning on other classes, otherwise correct "
                "MODEL.SparseRCNN.NUM_CLASSES."
            )
    return ""
