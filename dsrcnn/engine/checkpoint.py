"""Checkpoints: written whole, read safely, with a report of what was loaded."""

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
from .weight_io import read_pickle, read_weights, write_atomically

__all__ = ["ReportingCheckpointer"]

_SHOWN = 6


class ReportingCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, with one readable report instead of several warnings.

    Attributes:
        strict: a tensor of the model that the file lacks or has in another shape is an error: an
            evaluation with partly random weights means nothing.
        prefer_average: load the averaged weights (``MODEL.EMA``) where the file has them.
        trust: run code that a pickled file may hold.
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
        """Take the model, and what else belongs into a checkpoint."""
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.strict = strict
        self.prefer_average = prefer_average
        self.trust = trust

    def save(self, name: str, **kwargs: Any) -> None:
        """Write everything to ``<name>.pth``, which becomes the last checkpoint.

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
        """Write a file into the folder of the checkpoints; resuming does not consider it."""
        if self.save_dir and self.save_to_disk:
            path = os.path.join(self.save_dir, name)
            self.logger.info("Saving %s", path)
            write_atomically(path, lambda file: torch.save(content, file))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Note which checkpoint is the last."""
        path = os.path.join(self.save_dir, "last_checkpoint")
        write_atomically(path, lambda file: file.write(last_filename_basename.encode()))

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Go on from the newest checkpoint that can be read by all processes, or load weights.

        Raises:
            WeightsError: if there are checkpoints, but none can be read or used.
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
            self.logger.warning("%s Trying the checkpoint before it.", damages[0])
        raise WeightsError(
            f"No checkpoint in {self.save_dir} can be read. Leave out --resume to start anew."
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
        """Load a file; see `DetectionCheckpointer.load`.

        Raises:
            UnreadableWeightsError: if the file is damaged.
            WeightsError: if it is missing, or does not fit and `strict` is set.
        """
        if not path and self.strict:
            raise WeightsError(
                "MODEL.WEIGHTS is empty, so the model would be evaluated with random weights. "
                "Write MODEL.WEIGHTS <checkpoint>, or --resume for the last one in OUTPUT_DIR."
            )
        missing = f"Weights {path!r} do not exist; correct MODEL.WEIGHTS."
        if path and "://" not in path:
            found = comm.all_gather(os.path.isfile(path))
            if any(found) and not all(found):
                raise WeightsError(
                    f"Weights {path!r} exist on some machines only. OUTPUT_DIR and MODEL.WEIGHTS "
                    "must be where all machines find them."
                )
            if not all(found):
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
        """Content of a file as Detectron2 gives it; called once by `load`."""
        if not filename.endswith(".pkl"):
            content = read_weights(filename, trust=self.trust)
            if filename.endswith(".pyth"):  # pycls', as Detectron2 reads them
                weights = content["model_state"]
                return {"model": weights, "__author__": "pycls", "matching_heuristics": True}
            if "model" not in content:
                content = {"model": content}
            if self.prefer_average and "ema" in content:
                self.logger.info("Taking the averaged weights of the file (MODEL.EMA).")
                content["model"] = content["ema"]["model"]
            return content
        content = read_pickle(filename, trust=self.trust)
        if "model" in content and "__author__" in content:
            return content
        blobs = content.get("blobs", content)
        weights = {k: v for k, v in blobs.items() if not k.endswith("_momentum")}
        return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}

    def _numbers_of_training(self) -> set[str]:
        """Keys of what is no weight: modules whose `averaged` is False take care of it."""
        parts = [(n, m) for n, m in self.model.named_modules() if not getattr(m, "averaged", True)]
        return {f"{name}.{key}" for name, module in parts for key in module.state_dict()}

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        """Replace fvcore's warnings by one report; called once by `load`."""
        reshaped = [
            (k, tuple(a), tuple(b))
            for k, a, b in incompatible.incorrect_shapes
            if k not in self._numbers_of_training()
        ]
        # Frozen norms do not count batches, and nothing depends on the count.
        changed = {k for k, _, _ in reshaped}
        missing = [
            k
            for k in incompatible.missing_keys
            if k not in changed and not k.endswith("num_batches_tracked")
        ]
        total = len(self.model.state_dict())
        loaded = total - len(missing) - len(reshaped)
        lines = [f"Weights: {loaded} of {total} tensors loaded."]
        if reshaped:
            shapes = [f"{k} {a} in the file, {b} in the model" for k, a, b in reshaped]
            lines.append(f"Of another shape, start anew: {_some(shapes)}.{_class_hint(reshaped)}")
        if missing:
            lines.append(f"Not in the file, start anew: {_by_part(missing)}.")
        if incompatible.unexpected_keys:
            lines.append(f"In the file, not used: {_by_part(incompatible.unexpected_keys)}.")
        report = "\n  ".join(lines)
        if self.strict and (missing or reshaped):
            raise WeightsError(
                f"The weights do not fit the model that is to be evaluated.\n  {report}\n  "
                "Use the config the weights were trained with."
            )
        if missing or reshaped:
            self.logger.warning(report)
        else:
            self.logger.info(report)


def _some(items: list[str]) -> str:
    more = len(items) - _SHOWN
    return "; ".join(items[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")


def _by_part(keys: Iterable[str]) -> str:
    """Keys summed up by the part of the model they belong to."""
    parts = Counter(".".join(key.split(".")[:2]) for key in keys)
    return _some([f"{part} ({count})" for part, count in sorted(parts.items())])


def _class_hint(reshaped: list[tuple[str, tuple[int, ...], tuple[int, ...]]]) -> str:
    for key, found, expected in reshaped:
        if key.endswith("class_logits.bias"):
            return (
                f" The file has {found[0]} classes, the model {expected[0]}: right when fine-tuning"
                " on other classes, otherwise correct MODEL.SparseRCNN.NUM_CLASSES."
            )
    return ""
